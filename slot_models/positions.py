"""Sizes and position codes of a grid."""

import torch
from torch import Tensor

Size = int | tuple[int, int]


def height_width(size: Size) -> tuple[int, int]:
    """A number is the side of a square."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def coordinates(height: int, width: int) -> Tensor:
    """The four-way linear ramp of Slot Attention (Locatello et al. 2020, appendix E.2).

    Returns:
        float32 [height, width, 4]: y, x, 1 - y and 1 - x, each from 0 to 1.
    """
    # On the CPU first: on the meta device these few numbers would load torch._dynamo and sympy, seconds of a start.
    ramps = (torch.linspace(0, 1, length, device="cpu") for length in (height, width))
    y, x = torch.meshgrid(*ramps, indexing="ij")
    return torch.stack([y, x, 1 - y, 1 - x], dim=-1).to(torch.get_default_device())  # [H, W, 4]
