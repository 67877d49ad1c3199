"""Adaptive slots: a gate decides for each slot whether the image needs it (AdaSlot, Fan et al. 2024)."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from slot_models.attention import SlotAttention

MIXTURE_EPS = 1e-5
Stage = Literal["open", "random", "deciding"]


class Gate(NamedTuple):
    """What the gate decided.

    keep: float [B, K], exactly 0 or 1 in value; its gradient is the straight-through one.
    probability: float [B, K], the probability of keeping the slot without noise.
    """

    keep: Tensor
    probability: Tensor


class SlotGate(nn.Module):
    """Keep or drop, for each slot on its own (Fan et al. 2024, section 3.2).

    ``logits = W_2 relu(W_1 LN(slots))`` [B, K, 2], channel 1 is keep; sampled by a straight-through Gumbel softmax.
    Better than the released code in two ways: without noise the decision is the argmax, so evaluation is
    deterministic, and the likeliest slot is kept where none would be.

    Args:
        dim: width of a slot.
        keep_bias: initial logit of keep over drop. Positive, so that a fresh gate keeps its slots until it has a
            reason to drop one.
        exploration: the least probability of either decision; the logits are bounded smoothly. Above zero, both
            decisions keep being tried, so the gate cannot saturate, and no two slots can rely on painting one object
            between them.

    Raises:
        ValueError: exploration is not in [0, 0.5).
    """

    def __init__(self, dim: int, *, keep_bias: float = 0.0, exploration: float = 0.0) -> None:
        super().__init__()
        if not 0 <= exploration < 0.5:
            raise ValueError(f"exploration: {exploration} is not in [0, 0.5)")
        self.limit = math.log((1 - exploration) / exploration) / 2 if exploration else math.inf
        self.keep_bias = keep_bias
        self.norm = nn.LayerNorm(dim)
        self.hidden = nn.Linear(dim, 4 * dim)
        self.logits = nn.Linear(4 * dim, 2)
        with torch.no_grad():
            self.logits.bias.copy_(torch.tensor([-keep_bias / 2, keep_bias / 2]))

    def forward(
        self, slots: Tensor, noise: Tensor | None = None, temperature: float = 1.0, stage: Stage = "deciding"
    ) -> Gate:
        """Decides.

        Args:
            slots: float [B, K, D].
            noise: standard Gumbel [B, K, 2]; without it the decision is the likelier one.
            temperature: of the softmax whose gradient the decision takes; the decision itself does not depend on it.
            stage: of training. "open" keeps every slot; "random" keeps each with the probability of a fresh gate,
                sigmoid(keep_bias), whatever it holds: slots that cannot rely on each other learn to hold whole objects.
                In both the gate still runs, with a gradient of zero: ZeRO-3 would repeat its last one otherwise.

        Raises:
            ValueError: the temperature is not positive, or the noise has another shape than the logits.
        """
        if not temperature > 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        logits = self.logits(self.hidden(self.norm(slots)).relu())  # [B, K, 2]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if stage == "random":
            logits = 0.0 * logits + logits.new_tensor([-self.keep_bias / 2, self.keep_bias / 2])
        if self.limit < math.inf:
            logits = self.limit * (logits / self.limit).tanh()
        if noise is not None and noise.shape != logits.shape:
            raise ValueError(f"noise: shape {tuple(noise.shape)} is not {tuple(logits.shape)}")
        probability = logits.softmax(dim=-1)[..., 1]  # [B, K]
        noisy = logits if noise is None else logits + noise.to(logits)
        soft = (noisy / temperature).softmax(dim=-1)[..., 1]  # [B, K]
        margin = noisy[..., 1] - noisy[..., 0]
        hard = (margin > 0).to(soft)
        likeliest = torch.zeros_like(hard).scatter(1, margin.argmax(dim=1, keepdim=True), 1.0)
        hard = torch.where(hard.sum(dim=1, keepdim=True) > 0, hard, likeliest)  # an image has at least one slot
        if stage == "open":
            return Gate(keep=torch.ones_like(hard) + 0.0 * soft, probability=probability)
        return Gate(keep=hard + (soft - soft.detach()), probability=probability)


class AdaptiveSlotWrapper(nn.Module):
    """Slot attention followed by the gate: ``slots, keep = wrapper(inputs)``.

    Args:
        slot_attn: the attention to wrap; its ``dim`` is the gate's.
        temperature: of the straight-through gradient.
    """

    def __init__(self, slot_attn: SlotAttention, temperature: float = 1.0) -> None:
        super().__init__()
        self.slot_attn = slot_attn
        self.gate = SlotGate(slot_attn.dim)
        self.temperature = temperature

    def forward(
        self, inputs: Tensor, *, noise: Tensor | None = None, gate_noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """inputs [B, N, C] -> slots [B, K, D], keep [B, K]; see SlotAttention and SlotGate for the noises."""
        slots = self.slot_attn(inputs, noise=noise)
        return slots, self.gate(slots, gate_noise, self.temperature).keep


@torch.no_grad()
def keep_differences(images: Tensor, pictures: Tensor, mask_logits: Tensor, keep: Tensor) -> Tensor:
    """What keeping each slot does to the reconstruction error: its error with the slot less its error without it.

    The other slots stay as they were decided. The slope that the paper's straight-through estimator takes at the
    decision instead says little: where a slot alone explains a region, the mixture is normalised, so the slope is
    zero while the slot is kept and huge while it is dropped, and the gate saturates at keeping everything. The
    difference is the local expectation gradient of a Bernoulli decision (Titsias & Lazaro-Gredilla 2015).

    Args:
        images: float [B, 3, H, W].
        pictures: float [B, K, 3, H, W].
        mask_logits: float [B, K, H, W].
        keep: float [B, K], 0 or 1.

    Returns:
        float [B, K], mean squared error per value; negative where the image needs the slot.
    """
    alpha = mask_logits.softmax(dim=1)[:, :, None]  # [B, K, 1, H, W]
    keep = keep.to(alpha.dtype)[:, :, None, None, None]  # [B, K, 1, 1, 1]
    weight = (alpha * keep).sum(dim=1, keepdim=True)  # [B, 1, 1, H, W]
    painted = (alpha * keep * pictures).sum(dim=1, keepdim=True)  # [B, 1, 3, H, W]
    errors = []
    for change in (1 - keep, -keep):  # to keeping it, to dropping it
        mixed = (painted + change * alpha * pictures) / ((weight + change * alpha).clamp(min=0) + MIXTURE_EPS)
        errors.append((mixed - images[:, None]).square().mean(dim=(2, 3, 4)))  # [B, K]
    return errors[0] - errors[1]


def masked_mixture(mask_logits: Tensor, keep: Tensor) -> Tensor:
    """Mixture weights without the dropped slots (Fan et al. 2024, equation 8).

    Args:
        mask_logits: float [B, K, H, W].
        keep: float [B, K], 0 or 1.

    Returns:
        float [B, K, H, W], summing over the kept slots to s / (s + 1e-5), where s is their share without the gate.
    """
    alpha = mask_logits.softmax(dim=1) * keep.to(mask_logits.dtype)[:, :, None, None]  # [B, K, H, W]
    return alpha / (alpha.sum(dim=1, keepdim=True) + MIXTURE_EPS)
