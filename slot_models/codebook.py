"""A codebook of slot prototypes: state that the training loop moves, once a step."""

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional

from slot_models.attention import fixed_noise
from slot_models.checks import check_positive, check_shape
from slot_models.precision import at_least_float, full_precision


class Codebook(nn.Module):
    """Prototypes as running means of the slots nearest to them (mini-batch k-means; van den Oord et al. 2017, app. A).

    No forward changes it: ``tally`` says what a batch would change, tallies of micro batches and ranks add up, and
    ``update`` applies their sum. So a step's codebook is a function of its global batch, however that was split.

    Args:
        size: M, the number of codes.
        dim: D.
        decay: of the running means.
        dead_below: a code whose running count falls below it moves to where slots are.
        seed: keys the first codes and the offsets of moved ones.

    Raises:
        ValueError: a size is not positive, or the decay is not in (0, 1).
    """

    def __init__(self, size: int, dim: int, *, decay: float = 0.9, dead_below: float = 1e-2, seed: int = 0) -> None:
        super().__init__()
        check_positive(size=size, dim=dim)
        if not 0 < decay < 1:
            raise ValueError(f"decay: {decay} is not in (0, 1)")
        self.decay, self.dead_below = decay, dead_below
        self.codes: Tensor
        self.counts: Tensor
        self.offsets: Tensor
        offsets = fixed_noise(size, dim, seed)
        self.register_buffer("offsets", offsets, persistent=False)  # [M, D]
        self.register_buffer("codes", offsets.clone())  # [M, D]
        self.register_buffer("counts", torch.zeros(size))  # [M], running

    def nearest(self, slots: Tensor) -> Tensor:
        """slots [..., D] -> the index of each one's nearest code (Euclidean), int64 [...]."""
        slots = at_least_float(slots)
        codes = self.codes.to(slots)
        with full_precision(slots):  # which slots are duplicates is not to depend on rounding
            products = einsum(slots, codes, "... d, m d -> ... m")
        return (codes.square().sum(dim=1) - 2 * products).argmin(dim=-1)  # |slot|^2 is the same for every code

    def look_up(self, indices: Tensor) -> Tensor:
        """indices [...] -> codes [..., D]."""
        return functional.embedding(indices, self.codes)

    @torch.no_grad()
    def tally(self, slots: Tensor, keep: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What a batch says of the codes.

        Args:
            slots: float [B, K, D].
            keep: bool [B, K], the slots that count.
            weight: float [B], of each image; 0 for padding. One where it is not given.

        Returns:
            counts [M], and sums [M, D] of the slots nearest to each code, in float64: sums over micro batches and ranks
            add up.

        Raises:
            ValueError: the weight has another shape.
        """
        if weight is not None:
            check_shape("weight", weight, tuple(keep.shape[:1]))
        shares = keep.double() if weight is None else keep * weight.double()[:, None]  # [B, K]
        counts = torch.zeros(len(self.codes), dtype=torch.float64, device=slots.device)
        indices, shares = self.nearest(slots).flatten(), shares.flatten()
        sums = counts.new_zeros(self.codes.shape)
        flat = rearrange(slots, "b k d -> (b k) d").double()
        return counts.index_add(0, indices, shares), sums.index_add(0, indices, flat * shares[:, None])

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor) -> None:
        """Moves the codes by a step's tally; the loop calls it once a step, with the sum over the global batch.

        A code that no slot has used for long takes a place beside a busy one: the batch's mean there, off by one
        hundredth of its norm in a direction of the code's own. No more codes move in a step than were used in it.

        Args:
            counts: float64 [M].
            sums: float64 [M, D].
        """
        check_shape("counts", counts, (len(self.codes),))
        check_shape("sums", sums, tuple(self.codes.shape))
        before = self.counts.double()
        after = self.decay * before + (1 - self.decay) * counts
        moved = (self.decay * before[:, None] * self.codes.double() + (1 - self.decay) * sums) / after[:, None]
        codes = torch.where(after[:, None] > 0, moved, self.codes.double())

        used = counts > 0
        means = sums / counts.clamp(min=1e-12)[:, None]
        busiest = counts.argsort(descending=True, stable=True)  # [M], used codes first
        dead = after < self.dead_below
        place = dead.long().cumsum(0) - 1  # how many dead codes stand before this one
        moves = dead & (place < used.sum())
        model = busiest[place.clamp(min=0)]  # [M], the busy code that a dead one joins
        norm = means[model].norm(dim=1, keepdim=True) / means.shape[1] ** 0.5
        beside = means[model] + 0.01 * norm * self.offsets.double()
        self.codes.copy_(torch.where(moves[:, None], beside, codes))
        self.counts.copy_(torch.where(moves, 1.0, after))  # time to be used before it counts as dead again
