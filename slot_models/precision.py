"""What stays in full precision under autocast."""

import contextlib

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast off on the tensor's device, for arithmetic that is small or whose errors add up."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def at_least_float(tensor: Tensor) -> Tensor:
    """float32, or float64 where the tensor has it."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
