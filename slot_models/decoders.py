"""Decoders: each slot to a picture and a mask of its own."""

from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from slot_models.encoders import glorot
from slot_models.positions import coordinates

MaskCell = Literal["pixel", "cell"]


class SpatialBroadcastDecoder(nn.Module):
    """Broadcasts each slot over a grid, adds a position code and convolves (Watters et al. 2019).

    With ``patch = 1`` the grid is the image, as published for Tetrominoes and Multi-dSprites; with a larger patch the
    last layer writes patch x patch pixels for each grid cell.

    The first layer sees a constant plus a position code, and convolution is linear: the position's part is shared by
    all slots, and the slot's part is constant but at the borders, so a canvas of kernel x kernel cells has every value
    that it takes. Exact, and it removes most of that layer's arithmetic.

    Args:
        slot_dim: D.
        grid: cells a side.
        channels: width of the hidden layers.
        layers: number of hidden layers.
        kernel: odd size of their kernels, at most ``grid``.
        output_kernel: odd size of the last layer's kernel.
        patch: pixels a side that one cell becomes.
        mask: a mask logit for each "pixel", or one for each "cell", shared by its pixels, as decoders of patch
            features have (DINOSAUR, Seitzer et al. 2023).

    Raises:
        ValueError: a kernel is even or wider than the grid.
    """

    def __init__(
        self,
        slot_dim: int,
        grid: int,
        channels: int = 32,
        layers: int = 3,
        kernel: int = 5,
        output_kernel: int = 3,
        patch: int = 1,
        mask: MaskCell = "pixel",
    ) -> None:
        super().__init__()
        for name, size in {"kernel": kernel, "output_kernel": output_kernel}.items():
            if size % 2 == 0 or size > grid:
                raise ValueError(f"{name}: {size} is not an odd number up to the grid's {grid}")
        self.grid, self.patch, self.mask, self.padding = grid, patch, mask, kernel // 2
        self.position = nn.Linear(4, slot_dim)
        # The first layer's kernel is this module's own parameter: forward uses it twice, and ZeRO-3 gathers a
        # parameter for the module that owns it.
        self.first_weight = nn.Parameter(torch.empty(channels, slot_dim, kernel, kernel))
        self.first_bias = nn.Parameter(torch.zeros(channels))
        hidden: list[nn.Module] = []
        for _ in range(layers - 1):
            hidden += [nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.ReLU()]
        self.hidden = nn.Sequential(*hidden)
        outputs = 4 * patch**2 if mask == "pixel" else 3 * patch**2 + 1
        self.output = nn.Conv2d(channels, outputs, output_kernel, padding=output_kernel // 2)
        glorot(self)
        nn.init.xavier_uniform_(self.first_weight)

        self.coordinates: Tensor
        self.register_buffer("coordinates", coordinates(grid, grid), persistent=False)

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """slots [B, K, D] -> pictures [B, K, 3, H, W], mask logits [B, K, H, W]."""
        batch = slots.shape[0]
        hidden = self._first_layer(rearrange(slots, "b k d -> (b k) d")).relu()  # [BK, C, G, G]
        hidden = self.hidden(hidden)
        cells = rearrange(self.output(hidden), "(b k) c h w -> b k c h w", b=batch)
        colours = 3 * self.patch**2
        pictures = functional.pixel_shuffle(cells[:, :, :colours], self.patch)  # [B, K, 3, H, W]
        if self.mask == "cell":
            logits = repeat(cells[:, :, colours], "b k h w -> b k (h p) (w q)", p=self.patch, q=self.patch)
        else:
            logits = functional.pixel_shuffle(cells[:, :, colours:], self.patch).squeeze(2)
        return pictures, logits  # [B, K, 3, H, W], [B, K, H, W]

    def _first_layer(self, slots: Tensor) -> Tensor:
        position = rearrange(self.position(self.coordinates), "h w d -> 1 d h w")
        shared = functional.conv2d(position, self.first_weight, self.first_bias, padding=self.padding)  # [1, C, G, G]
        kernel = self.first_weight.shape[-1]
        canvas = repeat(slots, "n d -> n d h w", h=kernel, w=kernel).contiguous(memory_format=torch.channels_last)
        small = functional.conv2d(canvas, self.first_weight, padding=self.padding)  # [BK, C, kernel, kernel]
        return self._stretch(self._stretch(small, dim=2), dim=3) + shared

    def _stretch(self, small: Tensor, dim: int) -> Tensor:
        """Repeats the middle of a canvas until it is as long as the grid; its borders stay."""
        border = self.padding
        sizes = [-1] * small.dim()
        sizes[dim] = self.grid - 2 * border
        middle = small.narrow(dim, border, 1).expand(sizes)
        return torch.cat([small.narrow(dim, 0, border), middle, small.narrow(dim, border + 1, border)], dim=dim)
