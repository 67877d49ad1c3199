"""SlotAutoencoder: an image to slots and back."""

import math
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from slot_models.adaptive import Gate, SlotGate, Stage
from slot_models.attention import MultiHeadSlotAttention, Refined, SlotAttention
from slot_models.checks import check_choice, check_finite
from slot_models.decoders import Decoded, Decoder, MixtureDecoder
from slot_models.encoders import ConvEncoder, FeatureEncoder
from slot_models.meta import MetaSlotAttention
from slot_models.mixture import keep_differences
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
        In evaluation a dropped slot's means nothing: it is not decoded.
    reconstruction: float [B, C, H, W].
    target: float [B, C, H, W], what the reconstruction is of: the images, or a backbone's features.
    auxiliary: float [B], to be added to a reconstruction error that is a mean per value: what the error tells the gate,
        zero in value, with the gate gradient "difference"; and the weighted commitment of a codebook.
    code_tally: float64 [M, 1 + D], counts and sums of the codebook's codes in this batch, for move_codes; None without
        a codebook.
    attention: float [B, T, K, h, w], what each slot won of each input in each iteration, where that was asked for.
    """

    slots: Tensor
    keep: Tensor
    keep_probability: Tensor
    masks: Tensor
    pictures: Tensor | None
    reconstruction: Tensor
    target: Tensor
    auxiliary: Tensor
    code_tally: Tensor | None
    attention: Tensor | None = None

    def masks_at(self, height: int, width: int) -> Tensor:
        """The masks, resized bilinearly where they have another size. [B, K, height, width]"""
        if self.masks.shape[-2:] == (height, width):
            return self.masks
        return functional.interpolate(self.masks, (height, width), mode="bilinear", align_corners=False)


class SlotAutoencoder(nn.Module):
    """Encoder, slot attention, gate and decoder (Locatello et al. 2020; the gate: Fan et al. 2024).

    Without a gate or a codebook every slot is kept, with probability one. Without a backbone the encoder sees the
    images, and they are reconstructed; with one it sees the backbone's features, and those are reconstructed (DINOSAUR,
    Seitzer et al. 2023).

    Args:
        encoder: images [B, 3, H, W], or features [B, N, F], to inputs [B, N, C]: a ConvEncoder, or a FeatureEncoder.
        slot_attention: inputs to slots; a MetaSlotAttention decides itself which slots are kept.
        gate: which slots are kept.
        decoder: slots to a reconstruction.
        gate_gradient: what stands for d error / d keep in the straight-through gradient: the "slope" of the mixture
            at the decision, as published, or the "difference" that the decision makes (see keep_differences).
        backbone: images to features. The reconstruction's target is detached from it.
        commitment: weight of a codebook's commitment.

    Raises:
        ValueError: the gate's gradient is to be the difference, and the decoder is not a mixture; or there are both a
            gate and a codebook.
    """

    def __init__(
        self,
        encoder: ConvEncoder | FeatureEncoder,
        slot_attention: SlotAttention | MultiHeadSlotAttention | MetaSlotAttention,
        gate: SlotGate | None,
        decoder: Decoder,
        gate_gradient: GateGradient = "slope",
        backbone: ViTBackbone | None = None,
        commitment: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("gate_gradient", gate_gradient, GateGradient)
        if gate_gradient == "difference" and not isinstance(decoder, MixtureDecoder):
            raise ValueError(
                "gate_gradient: 'difference' needs a decoder that mixes the slots' pictures, and "
                f"{type(decoder).__name__} draws none; take 'slope'"
            )
        attention = slot_attention
        if isinstance(attention, MetaSlotAttention):
            attention = attention.slot_attention
            if gate is not None:
                raise ValueError("gate: the codebook decides which slots are kept, and so would it; leave one out")
        self.gate_gradient, self.backbone, self.commitment = gate_gradient, backbone, commitment
        # A diverging run is told by its loss, not in the middle of a step.
        attention.checks_values = False
        self.encoder, self.slot_attention, self.gate, self.decoder = encoder, slot_attention, gate, decoder

    def forward(
        self,
        images: Tensor,
        slot_noise: Tensor | None = None,
        gate_noise: Tensor | None = None,
        input_noise: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        temperature: float = 1.0,
        stage: Stage = "deciding",
        trace: bool = False,
    ) -> SlotOutput:
        """Encodes and decodes.

        Args:
            images: float [B, 3, H, W] in [-1, 1].
            slot_noise: standard normal [B, K, D]; a fixed draw where it is not given.
            gate_noise: standard Gumbel [B, K, 2]; the gate takes its argmax where it is not given.
            input_noise: standard normal [B, 2, T, N, C], for a codebook's two passes; none where it is not given.
            weight: float [B], what each image counts in a codebook's tally; 0 for padding.
            temperature: of the gate's gradient.
            stage: of the training, see SlotGate. A codebook prunes when it is "deciding".
            trace: also return the attention of each iteration, for pictures; it is computed apart, and a codebook's
                second pass is left out.

        Raises:
            ValueError: a shape does not fit, or an argument holds NaN or infinity.
        """
        seen, target = self._see(images)  # [B, 3, H, W] or [B, N, F], [B, C, h, w]
        inputs = self.encoder(seen)  # [B, N, C]
        slots, gate, added, tally = self._find(inputs, slot_noise, gate_noise, input_noise, weight, temperature, stage)
        keep = gate.keep
        by_difference = self.gate_gradient == "difference"
        decoded: Decoded = self.decoder(slots, keep.detach() if by_difference else keep, target)
        if by_difference and keep.requires_grad:
            assert isinstance(self.decoder, MixtureDecoder)
            assert decoded.pictures is not None and decoded.mask_logits is not None  # a mixture has them
            eps = self.decoder.eps
            differences = keep_differences(target, decoded.pictures, decoded.mask_logits, keep, eps)
            added = added + (differences * (keep - keep.detach())).sum(dim=1)
        given = {"images": images, "slot_noise": slot_noise, "gate_noise": gate_noise, "input_noise": input_noise}
        check_finite(decoded.reconstruction, **given)
        return SlotOutput(
            slots=slots,
            keep=keep,
            keep_probability=gate.probability,
            masks=decoded.masks,
            pictures=decoded.pictures,
            reconstruction=decoded.reconstruction,
            target=target,
            auxiliary=added,
            code_tally=tally,
            attention=self._trace(inputs, slot_noise) if trace else None,
        )

    @torch.no_grad()
    def move_codes(self, tally: Tensor) -> None:
        """Moves the codebook by a step's ``code_tally``, summed over the global batch: once a step, on every rank."""
        assert isinstance(self.slot_attention, MetaSlotAttention)
        self.slot_attention.codebook.update(tally[:, 0], tally[:, 1:])

    def _see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder is given, and what is to be reconstructed."""
        if self.backbone is None:
            return images, images
        features = self.backbone(images)  # [B, N, F]
        target = rearrange(features.detach(), "b (h w) f -> b f h w", h=self.backbone.grid[0])
        return features, at_least_float(target)

    def _find(
        self,
        inputs: Tensor,
        slot_noise: Tensor | None,
        gate_noise: Tensor | None,
        input_noise: Tensor | None,
        weight: Tensor | None,
        temperature: float,
        stage: Stage,
    ) -> tuple[Tensor, Gate, Tensor, Tensor | None]:
        """Slots [B, K, D]; which are kept; what that adds to the loss [B]; the codebook's tally."""
        if isinstance(self.slot_attention, MetaSlotAttention):
            prune = stage == "deciding"
            found = self.slot_attention(inputs, noise=slot_noise, input_noise=input_noise, weight=weight, prune=prune)
            keep = found.keep.to(found.slots.dtype)
            tally = torch.cat([found.counts[:, None], found.sums], dim=1)
            return found.slots, Gate(keep, keep), self.commitment * found.commitment, tally
        slots = self.slot_attention(inputs, noise=slot_noise)
        if self.gate is not None:
            gate = self.gate(slots, gate_noise, temperature, stage)
        else:
            every = torch.ones(slots.shape[:2], device=slots.device)
            gate = Gate(every, every)
        return slots, gate, torch.zeros_like(gate.keep[:, 0]), None

    @torch.no_grad()
    def _trace(self, inputs: Tensor, slot_noise: Tensor | None) -> Tensor:
        """The attention of each iteration, one call each: [B, T, K, h, w]."""
        attention = self.slot_attention
        if isinstance(attention, MetaSlotAttention):
            attention = attention.slot_attention
        iterations, attention.iters = attention.iters, 1
        try:
            found: Refined = attention(inputs, noise=slot_noise, return_attention=True)
            seen = [found.attention]
            for _ in range(iterations - 1):
                found = attention(inputs, slots=found.slots, return_attention=True)
                seen.append(found.attention)
        finally:
            attention.iters = iterations
        return rearrange(torch.stack(seen, dim=1), "b t k (h w) -> b t k h w", h=self._grid[0])

    @property
    def _grid(self) -> tuple[int, int]:
        """Of the inputs: height and width."""
        return (self.encoder if self.backbone is None else self.backbone).grid  # type: ignore[return-value]

    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one image's noise by what it is for: slots and inputs take normal noise, the gate Gumbel's."""
        attention = self.slot_attention
        shapes: dict[str, tuple[int, ...]] = {"slots": (attention.num_slots, attention.dim)}
        if self.gate is not None:
            shapes["gate"] = (attention.num_slots, 2)
        if isinstance(attention, MetaSlotAttention) and bool(attention.noise_levels.any()):
            shapes["inputs"] = (2, len(attention.noise_levels), math.prod(self._grid), self.encoder.dim)
        return shapes
