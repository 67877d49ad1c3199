"""Between pixels and what a model sees."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_model(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1]."""
    channels_first = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))  # [N, 3, H, W]
    return torch.from_numpy(channels_first).to(torch.float32).div_(127.5).sub_(1.0)


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """float [N, 3, H, W], clipped to [-1, 1] -> uint8 [N, H, W, 3]; undoes `to_model` exactly."""
    scaled = images.detach().float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round()
    pixels: NDArray[np.uint8] = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels
