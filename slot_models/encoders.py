"""Encoders: images to a set of features."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from slot_models.positions import coordinates


class ConvEncoder(nn.Module):
    """Convolutions, a position code, and an MLP on each position (Locatello et al. 2020, table 3).

    Args:
        image_size: height and width of the images in pixels; a stride must divide what it meets.
        channels: C, the width of every layer.
        kernel: odd size of the square kernels.
        strides: one for each layer.

    Raises:
        ValueError: a kernel is even, or a stride does not divide the size it meets.
    """

    def __init__(self, image_size: int, channels: int = 32, kernel: int = 5, strides: Sequence[int] = (1, 1, 1, 1)):
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel: {kernel} is even; take an odd one")
        layers: list[nn.Module] = []
        size, width = image_size, 3
        for stride in strides:
            if size % stride:
                raise ValueError(f"strides: {stride} does not divide the size {size} that it meets")
            size //= stride
            layers += [nn.Conv2d(width, channels, kernel, stride, padding=(kernel - 1) // 2), nn.ReLU()]
            width = channels
        self.image_size, self.grid, self.dim = image_size, size, channels
        self.convolutions = nn.Sequential(*layers)
        self.position = nn.Linear(4, channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))
        self.coordinates: Tensor
        self.register_buffer("coordinates", coordinates(size, size), persistent=False)
        glorot(self)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> features [B, N, C], N positions in row order."""
        features = self.convolutions(images.contiguous(memory_format=torch.channels_last))
        features = rearrange(features, "b c h w -> b h w c") + self.position(self.coordinates)
        normed = self.norm(rearrange(features, "b h w c -> b (h w) c"))
        positions: Tensor = self.mlp(normed)  # [B, N, C]
        return positions


def glorot(module: nn.Module) -> None:
    """Glorot-uniform kernels and zero biases for every dense and convolution layer, as the original."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
