"""SlotAutoencoder: an image to slots and back."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from einops import einsum
from torch import Tensor, nn

from slot_models.adaptive import Gate, SlotGate, Stage, keep_differences, masked_mixture
from slot_models.attention import Gradient, Initial, SlotAttention
from slot_models.decoders import MaskCell, SpatialBroadcastDecoder
from slot_models.encoders import ConvEncoder

GateGradient = Literal["slope", "difference"]


class SlotOutput(NamedTuple):
    """What the autoencoder saw in a batch.

    slots: float [B, K, D].
    keep: float [B, K], 0 or 1 in value.
    keep_probability: float [B, K].
    masks: float [B, K, H, W], each slot's share of each pixel; dropped slots have none.
    pictures: float [B, K, 3, H, W], what each slot paints.
    reconstruction: float [B, 3, H, W].
    gate_term: float [B], zero in value; to be added to a reconstruction error that is a mean per value. With the gate
        gradient "difference" it carries what the error tells the gate.
    """

    slots: Tensor
    keep: Tensor
    keep_probability: Tensor
    masks: Tensor
    pictures: Tensor
    reconstruction: Tensor
    gate_term: Tensor


class SlotAutoencoder(nn.Module):
    """Encoder, slot attention, gate and decoder (Locatello et al. 2020; the gate: Fan et al. 2024).

    Without a gate every slot is kept, with probability one.

    Args:
        gate_gradient: what stands for d error / d keep in the straight-through gradient: the "slope" of the mixture
            at the decision, as published, or the "difference" that the decision makes (see keep_differences).
    """

    def __init__(
        self,
        encoder: nn.Module,
        slot_attention: SlotAttention,
        gate: SlotGate | None,
        decoder: nn.Module,
        gate_gradient: GateGradient = "slope",
    ) -> None:
        super().__init__()
        self.gate_gradient = gate_gradient
        self.encoder, self.slot_attention, self.gate, self.decoder = encoder, slot_attention, gate, decoder

    def forward(
        self,
        images: Tensor,
        slot_noise: Tensor | None = None,
        gate_noise: Tensor | None = None,
        *,
        temperature: float = 1.0,
        stage: Stage = "deciding",
    ) -> SlotOutput:
        """Encodes and decodes.

        Args:
            images: float [B, 3, H, W] in [-1, 1].
            slot_noise: standard normal [B, K, D]; a fixed draw where it is not given.
            gate_noise: standard Gumbel [B, K, 2]; the gate takes its argmax where it is not given.
            temperature: of the gate's gradient.
            stage: of the gate's training, see SlotGate.
        """
        slots = self.slot_attention(self.encoder(images), noise=slot_noise)  # [B, K, D]
        keep, probability = self._decide(slots, gate_noise, temperature, stage)
        pictures, mask_logits = self.decoder(slots)  # [B, K, 3, H, W], [B, K, H, W]
        by_difference = self.gate_gradient == "difference"
        masks = masked_mixture(mask_logits, keep.detach() if by_difference else keep)
        reconstruction = einsum(masks, pictures, "b k h w, b k c h w -> b c h w")
        gate_term = torch.zeros_like(keep[:, 0])
        if by_difference and keep.requires_grad:
            differences = keep_differences(images, pictures, mask_logits, keep)
            gate_term = (differences * (keep - keep.detach())).sum(dim=1)
        return SlotOutput(slots, keep, probability, masks, pictures, reconstruction, gate_term)

    def _decide(self, slots: Tensor, noise: Tensor | None, temperature: float, stage: Stage) -> Gate:
        if self.gate is None:
            every = torch.ones(slots.shape[:2], device=slots.device)
            return Gate(every, every)
        gate: Gate = self.gate(slots, noise, temperature, stage)
        return gate


def build_autoencoder(
    *,
    image_size: int,
    num_slots: int,
    slot_dim: int = 64,
    iterations: int = 3,
    hidden_dim: int = 128,
    initial: Initial = "shared",
    initial_sigma: float | None = None,
    gradient: Gradient = "full",
    adaptive: bool = True,
    keep_bias: float = 0.0,
    gate_exploration: float = 0.0,
    gate_gradient: GateGradient = "slope",
    encoder_channels: int = 32,
    encoder_kernel: int = 5,
    encoder_strides: Sequence[int] = (1, 1, 1, 1),
    decoder_channels: int = 32,
    decoder_layers: int = 3,
    decoder_kernel: int = 5,
    decoder_output_kernel: int = 3,
    decoder_patch: int = 1,
    decoder_mask: MaskCell = "pixel",
) -> SlotAutoencoder:
    """Puts an autoencoder together from plain numbers; the defaults are the published Tetrominoes model plus the gate.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if image_size % decoder_patch:
        raise ValueError(f"decoder_patch: {decoder_patch} does not divide image_size {image_size}")
    encoder = ConvEncoder(image_size, encoder_channels, encoder_kernel, encoder_strides)
    attention = SlotAttention(
        num_slots,
        slot_dim,
        iterations,
        hidden_dim=hidden_dim,
        input_dim=encoder.dim,
        initial=initial,
        initial_sigma=initial_sigma,
        gradient=gradient,
    )
    decoder = SpatialBroadcastDecoder(
        slot_dim,
        image_size // decoder_patch,
        decoder_channels,
        decoder_layers,
        decoder_kernel,
        decoder_output_kernel,
        decoder_patch,
        decoder_mask,
    )
    gate = SlotGate(slot_dim, keep_bias=keep_bias, exploration=gate_exploration) if adaptive else None
    return SlotAutoencoder(encoder, attention, gate, decoder, gate_gradient)
