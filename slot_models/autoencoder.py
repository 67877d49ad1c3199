"""SlotAutoencoder: an image to slots and back."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from slot_models.adaptive import Gate, SlotGate, Stage, keep_differences
from slot_models.attention import Gradient, Initial, SlotAttention
from slot_models.decoders import Decoded, Decoder, MaskCell, MixtureDecoder, SpatialBroadcastDecoder
from slot_models.encoders import ConvEncoder, Padding
from slot_models.precision import at_least_float
from slot_models.vit import ViTBackbone

GateGradient = Literal["slope", "difference"]


class SlotOutput(NamedTuple):
    """What the autoencoder saw in a batch.

    slots: float [B, K, D].
    keep: float [B, K], 0 or 1 in value.
    keep_probability: float [B, K].
    masks: float [B, K, H, W], each slot's share of each pixel, or of each patch of a backbone; dropped slots have none.
    pictures: float [B, K, C, H, W], what each slot paints; None with a decoder whose slots paint nothing of their own.
    reconstruction: float [B, C, H, W].
    target: float [B, C, H, W], what the reconstruction is of: the images, or a backbone's features.
    gate_term: float [B], zero in value; to be added to a reconstruction error that is a mean per value. With the gate
        gradient "difference" it carries what the error tells the gate.
    """

    slots: Tensor
    keep: Tensor
    keep_probability: Tensor
    masks: Tensor
    pictures: Tensor | None
    reconstruction: Tensor
    target: Tensor
    gate_term: Tensor

    def masks_at(self, height: int, width: int) -> Tensor:
        """The masks, resized bilinearly where they have another size. [B, K, height, width]"""
        if self.masks.shape[-2:] == (height, width):
            return self.masks
        return functional.interpolate(self.masks, (height, width), mode="bilinear", align_corners=False)


class SlotAutoencoder(nn.Module):
    """Encoder, slot attention, gate and decoder (Locatello et al. 2020; the gate: Fan et al. 2024).

    Without a gate every slot is kept, with probability one. Without a backbone the encoder sees the images, and they
    are reconstructed; with one it sees the backbone's features, and those are reconstructed (DINOSAUR, Seitzer et al.
    2023).

    Args:
        encoder: images [B, 3, H, W], or features [B, N, F], to inputs [B, N, C]: a ConvEncoder, or a FeatureEncoder.
        slot_attention: inputs to slots.
        gate: which slots are kept.
        decoder: slots to a reconstruction.
        gate_gradient: what stands for d error / d keep in the straight-through gradient: the "slope" of the mixture
            at the decision, as published, or the "difference" that the decision makes (see keep_differences).
        backbone: images to features. The reconstruction's target is detached from it.

    Raises:
        ValueError: the gate's gradient is to be the difference, and the decoder is not a mixture.
    """

    def __init__(
        self,
        encoder: nn.Module,
        slot_attention: SlotAttention,
        gate: SlotGate | None,
        decoder: Decoder,
        gate_gradient: GateGradient = "slope",
        backbone: ViTBackbone | None = None,
    ) -> None:
        super().__init__()
        if gate_gradient == "difference" and not isinstance(decoder, MixtureDecoder):
            raise ValueError(
                "gate_gradient: 'difference' needs a decoder that mixes the slots' pictures, and "
                f"{type(decoder).__name__} draws none; take 'slope'"
            )
        self.gate_gradient, self.backbone = gate_gradient, backbone
        slot_attention.checks_values = False  # a diverging run is told by its loss, not in the middle of a step
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
        seen, target = self._see(images)  # [B, 3, H, W] or [B, N, F], [B, C, h, w]
        slots = self.slot_attention(self.encoder(seen), noise=slot_noise)  # [B, K, D]
        keep, probability = self._decide(slots, gate_noise, temperature, stage)
        by_difference = self.gate_gradient == "difference"
        decoded: Decoded = self.decoder(slots, keep.detach() if by_difference else keep, target)
        gate_term = torch.zeros_like(keep[:, 0])
        if by_difference and keep.requires_grad:
            assert decoded.pictures is not None and decoded.mask_logits is not None  # a mixture has them
            differences = keep_differences(target, decoded.pictures, decoded.mask_logits, keep)
            gate_term = (differences * (keep - keep.detach())).sum(dim=1)
        return SlotOutput(
            slots, keep, probability, decoded.masks, decoded.pictures, decoded.reconstruction, target, gate_term
        )

    def _see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder is given, and what is to be reconstructed."""
        if self.backbone is None:
            return images, images
        features = self.backbone(images)  # [B, N, F]
        target = rearrange(features.detach(), "b (h w) f -> b f h w", h=self.backbone.grid[0])
        return features, at_least_float(target)

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
    encoder_padding: Padding = "centred",
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
    encoder = ConvEncoder(image_size, encoder_channels, encoder_kernel, encoder_strides, encoder_padding)
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
