"""Puts an autoencoder together from plain values, such as a recipe or a packaged model holds."""

from collections.abc import Callable, Mapping
from typing import Any

from slot_models.adaptive import SlotGate
from slot_models.attention import MultiHeadSlotAttention, SlotAttention
from slot_models.autoencoder import SlotAutoencoder
from slot_models.checks import check_positive
from slot_models.decoders import Decoder, SpatialBroadcastDecoder
from slot_models.encoders import ConvEncoder, FeatureEncoder
from slot_models.meta import MetaSlotAttention
from slot_models.patch_decoders import MLPPatchDecoder
from slot_models.transformer_decoder import TransformerDecoder
from slot_models.upsampling_decoder import UpsamplingBroadcastDecoder
from slot_models.vit import ViTBackbone

Options = Mapping[str, Any]


def build_autoencoder(
    *,
    image_size: int,
    num_slots: int,
    slot_dim: int = 64,
    encoder: Options | None = None,
    attention: Options | None = None,
    codebook: Options | None = None,
    gate: Options | None = None,
    decoder: Options | None = None,
) -> SlotAutoencoder:
    """An autoencoder of named parts; the defaults are the published Tetrominoes model.

    Each part is a mapping of its ``kind`` and of the arguments of that kind's class, less the sizes that another part
    decides.

    Args:
        image_size: pixels a side.
        num_slots: K.
        slot_dim: D.
        encoder: kind "conv" (ConvEncoder), or "vit" (ViTBackbone and FeatureEncoder; its features are reconstructed).
        attention: kind "slots" (SlotAttention) or "heads" (MultiHeadSlotAttention).
        codebook: ``size``, ``decay``, ``noise`` and ``commitment`` of MetaSlotAttention around it; none by default.
        gate: ``keep_bias``, ``exploration`` and ``gradient`` of a SlotGate; no gate by default.
        decoder: of images, kind "broadcast" (SpatialBroadcastDecoder) or "upsampling" (UpsamplingBroadcastDecoder); of
            features, "mlp" (MLPPatchDecoder) or "transformer" (TransformerDecoder).

    Raises:
        ValueError: parts or sizes that do not fit each other; the part is named.
        TypeError: an argument that the part's class has not.
    """
    check_positive(image_size=image_size)
    backbone, features = _encoder(image_size, slot_dim, encoder or {"kind": "conv"})
    slot_attention = _attention(num_slots, slot_dim, features.dim, attention or {"kind": "slots"})
    found: SlotAttention | MultiHeadSlotAttention | MetaSlotAttention = slot_attention
    commitment = 0.0
    if codebook is not None:
        if gate is not None:
            raise ValueError("codebook: it decides which slots are kept, and so does the gate; leave one of them out")
        options = dict(codebook)
        commitment = options.pop("commitment", 0.0)
        found = MetaSlotAttention(slot_attention, codebook_size=options.pop("size", 1024), **options)
    gate_options = dict(gate or {})
    gradient = gate_options.pop("gradient", "slope")
    return SlotAutoencoder(
        features,
        found,
        None if gate is None else SlotGate(slot_dim, **gate_options),
        _decoder(image_size, slot_dim, backbone, decoder or {"kind": "broadcast"}),
        gradient,
        backbone,
        commitment,
    )


def _encoder(image_size: int, slot_dim: int, given: Options) -> tuple[ViTBackbone | None, ConvEncoder | FeatureEncoder]:
    kind, options = _kind("encoder", given, ("conv", "vit"))
    if kind == "conv":
        return None, ConvEncoder(image_size, **options)
    dim = options.pop("dim", None)
    backbone = ViTBackbone(image_size=image_size, **options)
    return backbone, FeatureEncoder(backbone.dim, slot_dim if dim is None else dim)


def _attention(num_slots: int, dim: int, input_dim: int, given: Options) -> SlotAttention | MultiHeadSlotAttention:
    kind, options = _kind("attention", given, ("slots", "heads"))
    module: Callable[..., Any] = SlotAttention if kind == "slots" else MultiHeadSlotAttention
    attention: SlotAttention | MultiHeadSlotAttention = module(num_slots, dim, input_dim=input_dim, **options)
    return attention


def _decoder(image_size: int, slot_dim: int, backbone: ViTBackbone | None, given: Options) -> Decoder:
    drawn, patched = ("broadcast", "upsampling"), ("mlp", "transformer")
    kind, options = _kind("decoder", given, drawn + patched)
    if backbone is None:
        if kind not in drawn:
            raise ValueError(f"decoder: {kind!r} reconstructs a backbone's features; take one of {', '.join(drawn)}")
        if kind == "upsampling":
            return UpsamplingBroadcastDecoder(slot_dim, image_size, **options)
        patch = options.get("patch", 1)
        check_positive(patch=patch)
        if image_size % patch:
            raise ValueError(f"decoder.patch: {patch} does not divide image_size {image_size}")
        return SpatialBroadcastDecoder(slot_dim, image_size // patch, **options)
    if kind not in patched:
        raise ValueError(f"decoder: {kind!r} draws images; with encoder 'vit' take one of {', '.join(patched)}")
    module: Callable[..., Decoder] = MLPPatchDecoder if kind == "mlp" else TransformerDecoder
    return module(slot_dim, backbone.dim, backbone.grid, **options)


def _kind(part: str, given: Options, known: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    options = dict(given)
    kind = options.pop("kind", None)
    if kind not in known:
        raise ValueError(f"{part}.kind: {kind!r} is none of {', '.join(known)}")
    return kind, options
