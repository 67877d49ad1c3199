"""A loss that pushes the slots of an image apart."""

from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from slot_models.precision import full_precision


class OrthoSlotWrapper(nn.Module):
    """Any module that finds slots, with the slots' orthogonality loss as one more output.

    Args:
        slot_attention: its output is the slots [B, K, D], or a tuple that begins with them.
    """

    def __init__(self, slot_attention: nn.Module) -> None:
        super().__init__()
        self.slot_attention = slot_attention

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """``slots, loss = wrapper(inputs)``; what else the wrapped module returns stands between. loss [B]"""
        found = self.slot_attention(*args, **kwargs)
        outputs = found if isinstance(found, tuple) else (found,)
        return (*outputs, orthogonality(outputs[0]))


def orthogonality(slots: Tensor) -> Tensor:
    """Mean squared inner product of two different slots, centred on their mean (the package slot-attention 1.5.2).

    Args:
        slots: float [B, K, D].

    Returns:
        float [B]; its mean over the batch is the package's loss. Zero for a single slot.
    """
    centred = slots - slots.mean(dim=1, keepdim=True)
    with full_precision(slots):
        products = einsum(centred, centred, "b i d, b j d -> b i j")
    num_slots = slots.shape[1]
    others = ~torch.eye(num_slots, dtype=torch.bool, device=slots.device)
    return (products.square() * others).sum(dim=(1, 2)) / max(num_slots * (num_slots - 1), 1)
