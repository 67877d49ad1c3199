"""Adaptive slots: a gate decides for each slot whether the image needs it (AdaSlot, Fan et al. 2024)."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from slot_models.attention import MultiHeadSlotAttention, SlotAttention
from slot_models.checks import check_choice, check_finite, check_positive, check_shape, check_slots
from slot_models.precision import at_least_float, full_precision

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
        ValueError: the width is not positive, or exploration is not in [0, 0.5).
    """

    def __init__(self, dim: int, *, keep_bias: float = 0.0, exploration: float = 0.0) -> None:
        super().__init__()
        check_positive(dim=dim)
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
            ValueError: the temperature is not positive, there are no slots, the noise has another shape than the
                logits, or there is no such stage.
        """
        check_temperature(temperature)
        check_choice("stage", stage, Stage)
        check_slots("slots", slots, self.hidden.in_features)
        with full_precision(slots):
            logits = at_least_float(self.logits(self.hidden(self.norm(slots.to(self.norm.weight))).relu()))  # [B, K, 2]
        if stage == "random":
            logits = 0.0 * logits + logits.new_tensor([-self.keep_bias / 2, self.keep_bias / 2])
        if self.limit < math.inf:
            logits = self.limit * (logits / self.limit).tanh()
        probability = logits.softmax(dim=-1)[..., 1]  # [B, K]
        noisy = logits
        if noise is not None:
            check_shape("noise", noise, tuple(logits.shape))
            noisy = logits + noise.to(logits)
        soft = (noisy / temperature).softmax(dim=-1)[..., 1]  # [B, K]
        margin = noisy[..., 1] - noisy[..., 0]
        hard = (margin > 0).to(soft)
        likeliest = torch.zeros_like(hard).scatter(1, margin.argmax(dim=1, keepdim=True), 1.0)
        hard = torch.where(hard.sum(dim=1, keepdim=True) > 0, hard, likeliest)  # an image has at least one slot
        if stage == "open":
            return Gate(keep=torch.ones_like(hard) + 0.0 * soft, probability=probability)
        return Gate(keep=hard + (soft - soft.detach()), probability=probability)


class PackageGate(nn.Module):
    """The gate of the PyPI package slot-attention 1.5.2, to go on with its models; it is not the paper's.

    One Linear without bias. Noise is added after the division by the temperature, so the temperature changes how often
    slots are kept; the gradient is that of the logits without noise; every slot may be dropped.

    Args:
        dim: width of a slot.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_positive(dim=dim)
        self.logits = nn.Linear(dim, 2, bias=False)

    def forward(self, slots: Tensor, noise: Tensor | None = None, temperature: float = 1.0) -> Gate:
        """slots [B, K, D], standard Gumbel noise [B, K, 2] -> Gate; without noise the decision is the likelier one."""
        check_temperature(temperature)
        check_slots("slots", slots, self.logits.in_features)
        with full_precision(slots):
            logits = at_least_float(self.logits(slots.to(self.logits.weight))) / temperature  # [B, K, 2]
        noisy = logits
        if noise is not None:
            check_shape("noise", noise, tuple(logits.shape))
            noisy = logits + noise.to(logits)
        hard = (noisy[..., 1] > noisy[..., 0]).to(logits)
        soft = logits.softmax(dim=-1)[..., 1]
        return Gate(keep=hard + (soft - soft.detach()), probability=soft)


class AdaptiveSlotWrapper(nn.Module):
    """Slot attention followed by the gate: ``slots, keep = wrapper(inputs)``.

    The penalty of its loss is ``keep_penalty(keep)``. While training, hand in ``gate_noise``: without it the gate takes
    the likelier decision, as it does at evaluation.

    Args:
        slot_attn: the attention to wrap; its ``dim`` is the gate's.
        temperature: of the straight-through gradient, unless a call says otherwise.
        gate: another gate than the paper's, such as PackageGate(dim).

    Raises:
        ValueError: the temperature is not positive.
    """

    def __init__(
        self,
        slot_attn: SlotAttention | MultiHeadSlotAttention,
        temperature: float = 1.0,
        gate: SlotGate | PackageGate | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        self.slot_attn = slot_attn
        self.gate = SlotGate(slot_attn.dim) if gate is None else gate
        self.temperature = temperature

    def forward(
        self,
        inputs: Tensor,
        num_slots: int | None = None,
        *,
        slots: Tensor | None = None,
        noise: Tensor | None = None,
        gate_noise: Tensor | None = None,
        input_mask: Tensor | None = None,
        temperature: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Finds the slots of a set of inputs and decides which of them it needs.

        Args:
            inputs, num_slots, slots, noise, input_mask: see SlotAttention.
            gate_noise: standard Gumbel [B, K, 2], see gumbel_noise; the likelier decision without it.
            temperature: for this call, of a schedule.

        Returns:
            slots [B, K, D]; keep [B, K], 0 or 1 in value, with the straight-through gradient.

        Raises:
            ValueError: see SlotAttention and SlotGate.
        """
        found = self.slot_attn(inputs, num_slots, slots=slots, noise=noise, input_mask=input_mask)
        gate = self.gate(found, gate_noise, self.temperature if temperature is None else temperature)
        if gate_noise is not None:
            check_finite(gate_noise, gate_noise=gate_noise)
        return found, gate.keep


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not positive")


def gumbel_noise(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, float32, from a generator that the caller owns."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    return -(-uniform.log()).log().float()


def keep_penalty(keep: Tensor) -> Tensor:
    """Share of the slots that an image keeps, to be weighted and added to its loss (Fan et al. 2024, equation 9).

    keep [B, K] -> [B]; the mean over the batch is the paper's mean over batch and slots.
    """
    return keep.mean(dim=1)


def penalty_weight(published: float, channels: int, height: int, width: int) -> float:
    """The published weight of the penalty, for a loss that is a mean.

    The paper adds ``published * mean(keep)`` to an error that is summed over an image's values; a mean is smaller by
    channels x height x width, and so is its weight: CLEVR10's 10 is 2.03e-4 at 3 x 128 x 128.
    """
    return published / (channels * height * width)
