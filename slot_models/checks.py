"""What is wrong with a tensor that a user handed in, in a sentence."""

import math
from typing import Any, get_args

import torch
from torch import Tensor


def check_positive(**sizes: int) -> None:
    """Raises ValueError, naming the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {size} is not positive")


def check_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raises ValueError unless the tensor has this shape; a letter stands for any size."""
    fits = tensor.dim() == len(shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} is not [{', '.join(map(str, shape))}]")


def check_slots(name: str, slots: Tensor, width: int) -> None:
    """Raises ValueError unless the tensor is [B, K, width] with one slot at least."""
    check_shape(name, slots, ("B", "K", width))
    if slots.shape[1] == 0:
        raise ValueError(f"{name}: shape {tuple(slots.shape)} has no slots; give one at least")


def check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor is a bool one of this shape."""
    check_shape(name, mask, shape)
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}: dtype {mask.dtype} is not torch.bool; compare, as in weight > 0")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raises ValueError unless the value is one of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"{name}: {value!r} is none of {', '.join(get_args(choices))}")


def check_finite(result: Tensor, **given: Tensor | None) -> None:
    """Raises ValueError where the result is not finite because of something that was given.

    The result is small and is looked at first. Nothing is looked at on a device, where a look waits for its whole
    queue, nor while a graph is traced, which knows no values.
    """
    if result.device.type != "cpu" or torch.compiler.is_compiling() or _all_finite(result):
        return
    for name, tensor in given.items():
        if tensor is not None and not _all_finite(tensor):
            raise ValueError(f"{name}: it holds NaN or infinity; mask such entries or leave them out")


def _all_finite(tensor: Tensor) -> bool:
    # A sum takes a tenth of the time, and only numbers that are huge need the second look.
    return math.isfinite(tensor.detach().sum().item()) or bool(tensor.isfinite().all())
