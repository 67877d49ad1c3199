"""How held-out images use the slots: which slots are ever kept, and whether the decision has collapsed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slot_models import SlotOutput

WHOLE = 0.99  # of an image's pixels: a slot with more has the image to itself
NEARLY_ALL = 0.99  # of the images: what so many share is a collapse


@dataclass(frozen=True)
class SlotUsage:
    """Sums over images.

    Fields:
        kept: float64 [K], images that keep the slot.
        by_number: float64 [K + 1], images that keep 0 to K slots.
        alone: float64 [1], images of which one slot has all the pixels.
    """

    kept: Tensor
    by_number: Tensor
    alone: Tensor

    @classmethod
    def zeros(cls, num_slots: int) -> "SlotUsage":
        return cls.from_tensor(num_slots, torch.zeros(2 * num_slots + 2, dtype=torch.float64))

    @classmethod
    def of(cls, output: SlotOutput, real: Tensor) -> "SlotUsage":
        """Of a batch, the images with ``real`` [B] alone. On the output's device: nothing is synchronised."""
        weight = real.double()
        keep = (output.keep > 0.5).double()  # [B, K]
        numbers = torch.arange(keep.shape[1] + 1, device=keep.device)
        shares = output.masks.mean(dim=(2, 3)).amax(dim=1)  # [B], of the slot with most pixels
        return cls(
            kept=weight @ keep,
            by_number=weight @ (keep.sum(dim=1, keepdim=True) == numbers).double(),
            alone=(weight * (shares > WHOLE)).sum()[None],
        )

    def __add__(self, other: "SlotUsage") -> "SlotUsage":
        return SlotUsage(self.kept + other.kept, self.by_number + other.by_number, self.alone + other.alone)

    def tensor(self) -> Tensor:
        """float64 [2 K + 2], to be summed over ranks."""
        return torch.cat([self.kept, self.by_number, self.alone])

    @classmethod
    def from_tensor(cls, num_slots: int, sums: Tensor) -> "SlotUsage":
        return cls(*torch.split(sums, [num_slots, num_slots + 1, 1]))

    @property
    def images(self) -> int:
        return int(self.by_number.sum())

    @property
    def dead(self) -> list[int]:
        """Slots that no image keeps."""
        return [slot for slot, images in enumerate(self.kept.tolist()) if images == 0]

    @property
    def always_on(self) -> list[int]:
        """Slots that every image keeps."""
        return [slot for slot, images in enumerate(self.kept.tolist()) if images == self.images]

    def metrics(self) -> dict[str, float]:
        """By their names in MLflow, without the group slots/."""
        return {
            "dead": float(len(self.dead)),
            "always_on": float(len(self.always_on)),
            "one_takes_all": float(self.alone) / self.images,
        }

    def collapses(self, needed: float | None) -> list[str]:
        """What has gone wrong with the slots, a sentence each, with the cure.

        Args:
            needed: slots that an image needs on average, objects and background; None where that is unknown.
        """
        slots, images = len(self.kept), self.images
        found = []
        every, at_most_one = float(self.by_number[-1]), float(self.by_number[:2].sum())
        if every >= NEARLY_ALL * images and (needed is None or needed < slots - 0.5):
            found.append(
                f"all {slots} slots are kept in {every / images:.0%} of the held-out images: the gate decides nothing; "
                "raise train.keep_weight or lower model.gate.keep_bias"
            )
        if slots > 1 and at_most_one >= NEARLY_ALL * images and (needed is None or needed > 1.5):
            found.append(
                f"no slot or a single one is kept in {at_most_one / images:.0%} of the held-out images: the penalty "
                "outweighs the reconstruction; lower train.keep_weight or let the gate decide later (train.gate_from)"
            )
        if slots > 1 and float(self.alone) >= NEARLY_ALL * images:
            found.append(
                f"one slot has all the pixels in {float(self.alone) / images:.0%} of the held-out images: the slots do "
                "not divide the scene; try a longer train.warmup_steps, a lower train.learning_rate or another seed"
            )
        return found
