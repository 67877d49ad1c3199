"""What is wrong with a tensor that a user handed in, in a sentence."""

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


def check_finite(result: Tensor, **given: Tensor | None) -> None:
    """Raises ValueError where the result is not finite because of something that was given.

    The result is small and is looked at first. Nothing is looked at on a device, where a look waits for its whole
    queue, nor while a graph is traced, which knows no values.
    """
    if result.device.type != "cpu" or torch.compiler.is_compiling() or bool(result.isfinite().all()):
        return
    for name, tensor in given.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: it holds NaN or infinity; mask such entries or leave them out")
