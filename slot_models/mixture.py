"""Pictures of slots mixed to one, without those that the gate drops; and what dropping one more would do."""

import math

import torch
from torch import Tensor

MIXTURE_EPS = 1e-5
# How far above the best kept slot a dropped one counts for the slope of keeping it, which is unbounded otherwise; the
# published epsilon bounds it by as much.
MOST_AHEAD = -math.log(MIXTURE_EPS)


@torch.no_grad()
def keep_differences(
    target: Tensor, pictures: Tensor, mask_logits: Tensor, keep: Tensor, eps: float = MIXTURE_EPS
) -> Tensor:
    """What keeping each slot does to the reconstruction error: its error with the slot less its error without it.

    The other slots stay as they were decided. The slope that the paper's straight-through estimator takes at the
    decision instead says little: where a slot alone explains a region, the mixture is normalised, so the slope is
    zero while the slot is kept and huge while it is dropped, and the gate saturates at keeping everything. The
    difference is the local expectation gradient of a Bernoulli decision (Titsias & Lazaro-Gredilla 2015).

    Args:
        target: float [B, C, H, W], what is reconstructed.
        pictures: float [B, K, C, H, W].
        mask_logits: float [B, K, H, W].
        keep: float [B, K], 0 or 1.
        eps: of the mixture, see masked_mixture.

    Returns:
        float [B, K], mean squared error per value; negative where the image needs the slot.
    """
    alpha = mask_logits.softmax(dim=1)[:, :, None]  # [B, K, 1, H, W]
    keep = keep.to(alpha.dtype)[:, :, None, None, None]  # [B, K, 1, 1, 1]
    weight = (alpha * keep).sum(dim=1, keepdim=True)  # [B, 1, 1, H, W]
    painted = (alpha * keep * pictures).sum(dim=1, keepdim=True)  # [B, 1, C, H, W]
    least = torch.finfo(alpha.dtype).tiny  # where nothing is left, nothing is painted
    errors = []
    for change in (1 - keep, -keep):  # to keeping it, to dropping it
        whole = ((weight + change * alpha).clamp(min=0) + eps).clamp(min=least)
        mixed = (painted + change * alpha * pictures) / whole
        errors.append((mixed - target[:, None]).square().mean(dim=(2, 3, 4)))  # [B, K]
    return errors[0] - errors[1]


def masked_mixture(mask_logits: Tensor, keep: Tensor, eps: float = MIXTURE_EPS) -> Tensor:
    """Mixture weights without the dropped slots (Fan et al. 2024, equation 8).

    What a dropped slot paints has no effect. Its mask logits have one through the published eps, which dims pixels
    that it would have dominated; an eps of 0 is the limit without: the softmax over the kept slots.

    Args:
        mask_logits: float [B, K, H, W].
        keep: float [B, K], 0 or 1.
        eps: added to the kept slots' share.

    Returns:
        float [B, K, H, W], summing over the kept slots to s / (s + eps), where s is their share without the gate.
    """
    keep = keep.to(mask_logits.dtype)[:, :, None, None]
    if eps == 0:
        return kept_softmax(mask_logits, keep, dim=1)
    alpha = mask_logits.softmax(dim=1) * keep  # [B, K, H, W]
    return alpha / (alpha.sum(dim=1, keepdim=True) + eps)


def kept_softmax(logits: Tensor, keep: Tensor, dim: int) -> Tensor:
    """Softmax times keep, renormalised; zero everywhere where nothing is kept.

    A dropped entry has exactly no effect, however large it is. The slope in its keep is what the softmax would give it,
    as long as it is not more than MOST_AHEAD above the kept ones.
    """
    keep = keep.to(logits.dtype)
    highest = logits.detach().masked_fill(keep == 0, -torch.inf).amax(dim=dim, keepdim=True)
    weights = (logits - highest).clamp(max=MOST_AHEAD).exp() * keep
    return weights / weights.sum(dim=dim, keepdim=True).clamp(
        min=MIXTURE_EPS
    )  # the sum is at least 1 where one is kept
