"""Encoders: images, or the features of a backbone, to a set of inputs for slot attention."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from slot_models.checks import check_choice, check_positive, check_shape
from slot_models.positions import Size, coordinates, height_width
from slot_models.same_padding import SameConv2d

Padding = Literal["same", "centred"]


class ConvEncoder(nn.Module):
    """Convolutions, a position code, and an MLP on each position (Locatello et al. 2020, table 3).

    Published: 32 channels for Tetrominoes and Multi-dSprites, 64 for CLEVR, and 64 with strides (1, 2, 2, 1) for set
    prediction on 128 pixels.

    Args:
        image_size: pixels a side, or (height, width); a stride must divide what it meets.
        channels: C, the width of every layer.
        kernel: odd size of the square kernels.
        strides: one for each layer.
        padding: "same" is TensorFlow's, as published: with a stride of 2 it pads a kernel of 5 by 1 before and 2 after.
            "centred" pads both sides by half a kernel, so that the first window is centred on the first pixel. They
            differ under strides alone.

    Raises:
        ValueError: a size is not positive, a kernel is even, there is no stride, or a stride does not divide the size
            it meets.
    """

    def __init__(
        self,
        image_size: Size,
        channels: int = 32,
        kernel: int = 5,
        strides: Sequence[int] = (1, 1, 1, 1),
        padding: Padding = "same",
    ) -> None:
        super().__init__()
        self.image_size = height, width = height_width(image_size)
        check_positive(image_size=min(height, width), channels=channels, kernel=kernel)
        if kernel % 2 == 0:
            raise ValueError(f"kernel: {kernel} is even; take an odd one")
        check_choice("padding", padding, Padding)
        if not strides:
            raise ValueError("strides: there are none; give one for each layer")
        layers: list[nn.Module] = []
        inputs = 3
        for stride in strides:
            check_positive(strides=stride)
            for size in (height, width):
                if size % stride:
                    raise ValueError(f"strides: {stride} does not divide the size {size} that it meets")
            height, width = height // stride, width // stride
            if padding == "same":
                layers.append(SameConv2d(inputs, channels, kernel, stride))
            else:
                layers.append(nn.Conv2d(inputs, channels, kernel, stride, padding=kernel // 2))
            layers.append(nn.ReLU(inplace=True))
            inputs = channels
        self.grid, self.dim = (height, width), channels
        self.convolutions = nn.Sequential(*layers)
        self.position = nn.Linear(4, channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, channels))
        self.coordinates: Tensor
        self.register_buffer("coordinates", coordinates(height, width), persistent=False)
        glorot(self)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> features [B, N, C], N positions in row order.

        Raises:
            ValueError: the images have another shape.
        """
        check_shape("images", images, ("B", 3, *self.image_size))
        features = self.convolutions(images.contiguous(memory_format=torch.channels_last))
        features = rearrange(features, "b c h w -> b h w c") + self.position(self.coordinates)
        normed = self.norm(rearrange(features, "b h w c -> b (h w) c"))
        positions: Tensor = self.mlp(normed)  # [B, N, C]
        return positions


class FeatureEncoder(nn.Module):
    """LayerNorm and an MLP on each of a backbone's features (DINOSAUR, Seitzer et al. 2023, appendix).

    Args:
        in_dim: F, width of the features; of the hidden layer too.
        dim: C, width of the result.

    Raises:
        ValueError: a width is not positive.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        check_positive(in_dim=in_dim, dim=dim)
        self.in_dim, self.dim = in_dim, dim
        self.mlp = nn.Sequential(
            nn.LayerNorm(in_dim), nn.Linear(in_dim, in_dim), nn.ReLU(inplace=True), nn.Linear(in_dim, dim)
        )
        glorot(self)

    def forward(self, features: Tensor) -> Tensor:
        """features [B, N, F] -> [B, N, C].

        Raises:
            ValueError: the features have another width.
        """
        check_shape("features", features, ("B", "N", self.in_dim))
        encoded: Tensor = self.mlp(features)
        return encoded


def glorot(module: nn.Module) -> None:
    """Glorot-uniform kernels and zero biases for every dense and convolution layer, as the original."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
