"""MetaSlot: slots that hold the same object, found through a codebook of prototypes, become one."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from slot_models.attention import MultiHeadSlotAttention, SlotAttention
from slot_models.checks import check_positive, check_shape
from slot_models.codebook import Codebook
from slot_models.precision import full_precision


class MetaSlots(NamedTuple):
    """What MetaSlotAttention found.

    slots: float [B, K, D]; zero where not kept.
    keep: bool [B, K].
    commitment: float [B], mean squared distance of an image's slots to their codes, with gradient to the slots.
    counts, sums: float64 [M], [M, D], the codebook's tally of this batch (see Codebook.update).
    attention: float [B, K, N], of the last iteration.
    """

    slots: Tensor
    keep: Tensor
    commitment: Tensor
    counts: Tensor
    sums: Tensor
    attention: Tensor


class MetaSlotAttention(nn.Module):
    """Slot attention with a variable number of slots (MetaSlot, Liu et al. 2025).

    A first pass, without gradient, finds slots; those whose nearest code is the same are duplicates, and all but the
    first are masked. A second pass starts from the codes of the rest, whose gradient goes straight to the initial slots
    (with the wrapped attention's gradient "bilevel", as in the paper). While training, noise on the inputs weakens over
    the iterations of each pass.

    Nothing here changes the codebook: see Codebook.

    Args:
        slot_attention: the attention to wrap.
        codebook_size: M.
        decay: of the codebook's running means.
        second_pass: False is the package slot-attention's MetaSlotAttention: one pass, duplicates averaged, the slots
            that are left moved to the front.
        noise: standard deviation of the noise in a pass's first iteration; it falls linearly to zero in the last.
        seed: of the codebook.
    """

    def __init__(
        self,
        slot_attention: SlotAttention | MultiHeadSlotAttention,
        *,
        codebook_size: int = 1024,
        decay: float = 0.9,
        second_pass: bool = True,
        noise: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(codebook_size=codebook_size)
        if noise < 0:
            raise ValueError(f"noise: {noise} is negative")
        self.slot_attention, self.second_pass = slot_attention, second_pass
        self.num_slots, self.dim = slot_attention.num_slots, slot_attention.dim
        self.codebook = Codebook(codebook_size, self.dim, decay=decay, seed=seed)
        self.noise_levels: Tensor
        steps = torch.arange(slot_attention.iters) / max(slot_attention.iters - 1, 1)
        self.register_buffer("noise_levels", noise * (1 - steps), persistent=False)  # [T]

    def forward(
        self,
        inputs: Tensor,
        num_slots: int | None = None,
        *,
        noise: Tensor | None = None,
        input_noise: Tensor | None = None,
        input_mask: Tensor | None = None,
        weight: Tensor | None = None,
        prune: bool = True,
    ) -> MetaSlots:
        """Finds the slots of a set of inputs, one for each object.

        Args:
            inputs, num_slots, noise, input_mask: see SlotAttention.
            input_noise: standard normal [B, 2, T, B's inputs N, C], for both passes; none at evaluation.
            weight: float [B], what each image counts in the tally; 0 for padding.
            prune: False keeps every slot, for the time in which the codebook forms.
        """
        attention = self.slot_attention
        count = attention.num_slots if num_slots is None else num_slots
        first_noise, second_noise = self._noises(input_noise, inputs)
        if not self.second_pass:
            return self._merged(inputs, count, noise, first_noise, input_mask, weight)

        initial = attention.initial_slots(inputs.shape[0], count, noise)  # [B, K, D]
        with torch.no_grad():
            found = attention(inputs, slots=initial, input_mask=input_mask, input_noise=first_noise)
            indices = self.codebook.nearest(found)  # [B, K]
            keep = ~_repeats(indices) if prune else torch.ones_like(indices, dtype=torch.bool)
            prototypes = self.codebook.look_up(indices).to(found)
        refined = attention(
            inputs,
            slots=prototypes + (initial - initial.detach()),
            input_mask=input_mask,
            slot_mask=keep,
            input_noise=second_noise,
            return_attention=True,
        )
        slots = refined.slots * keep[..., None]
        counts, sums = self.codebook.tally(slots, keep, weight)
        return MetaSlots(slots, keep, self._commitment(slots, keep), counts, sums, refined.attention)

    def _merged(
        self,
        inputs: Tensor,
        count: int,
        noise: Tensor | None,
        input_noise: Tensor | None,
        input_mask: Tensor | None,
        weight: Tensor | None,
    ) -> MetaSlots:
        """The package's way: duplicates averaged into their first, the slots that are left in front."""
        slots, attention = self.slot_attention(
            inputs, count, noise=noise, input_mask=input_mask, input_noise=input_noise, return_attention=True
        )
        every = torch.ones(slots.shape[:2], dtype=torch.bool, device=slots.device)
        counts, sums = self.codebook.tally(slots, every, weight)
        commitment = self._commitment(slots, every)
        indices = self.codebook.nearest(slots.detach())
        same = (indices[:, :, None] == indices[:, None, :]).to(slots.dtype)  # [B, K, K]
        with full_precision(slots):
            merged = same @ slots / same.sum(dim=2, keepdim=True)
            attention = same.to(attention) @ attention  # what the duplicates won together
        repeats = _repeats(indices)
        order = repeats.long().argsort(dim=1, stable=True)  # [B, K]
        keep = ~repeats.gather(1, order)
        merged = merged.gather(1, order[..., None].expand_as(merged)) * keep[..., None]
        attention = attention.gather(1, order[..., None].expand_as(attention)) * keep[..., None]
        return MetaSlots(merged, keep, commitment, counts, sums, attention)

    def _commitment(self, slots: Tensor, keep: Tensor) -> Tensor:
        codes = self.codebook.look_up(self.codebook.nearest(slots.detach())).to(slots)
        distances = (slots - codes).square().mean(dim=2)  # [B, K]
        return (distances * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1)

    def _noises(self, noise: Tensor | None, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if noise is None:
            return None, None
        batch, count, width = inputs.shape
        check_shape("input_noise", noise, (batch, 2, len(self.noise_levels), count, width))
        scaled = noise * self.noise_levels.to(noise)[:, None, None]
        return scaled[:, 0], scaled[:, 1]


def _repeats(indices: Tensor) -> Tensor:
    """Whether an earlier slot of the image has the same code. int [B, K] -> bool [B, K]"""
    same = indices[:, :, None] == indices[:, None, :]  # [B, K, K]
    return same.tril(diagonal=-1).any(dim=2)
