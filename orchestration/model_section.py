"""The recipe's model: named parts, as slot_models.build_autoencoder puts them together."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, Tag, model_validator

from orchestration.section import Section, kind_or


class ConvEncoderSection(Section):
    """Convolutions over pixels (Locatello et al. 2020)."""

    kind: Literal["conv"] = "conv"
    channels: PositiveInt = 32
    kernel: PositiveInt = 5
    strides: tuple[PositiveInt, ...] = Field((1, 1, 1, 1), min_length=1)
    padding: Literal["same", "centred"] = Field("same", description="same: TensorFlow's, as published")


class ViTEncoderSection(Section):
    """A vision transformer's features, which the decoder then reconstructs (DINOSAUR, Seitzer et al. 2023)."""

    kind: Literal["vit"]
    name: str = Field("vit_base_patch16_224.dino", description="of a model of timm")
    pretrained: bool = Field(False, description="fetch its weights from timm's hub")
    frozen: bool = Field(True, description="its weights are not trained")
    final_norm: bool = Field(False, description="the features after the transformer's last LayerNorm")
    dim: PositiveInt | None = Field(None, description="width of what the slots see; null: slot_dim")


class SlotAttentionSection(Section):
    """One head (Locatello et al. 2020)."""

    kind: Literal["slots"] = "slots"
    iters: PositiveInt = 3
    hidden_dim: PositiveInt = 128
    eps: float = Field(1e-8, gt=0)
    initial: Literal["shared", "per_slot"] = Field("shared", description="one learned Gaussian, or one for each slot")
    initial_sigma: float | None = Field(None, gt=0, description="start of the initial slots' standard deviation")
    gradient: Literal["full", "bilevel", "implicit"] = Field(
        "full", description="through all iterations, or the last alone, with a way to the initial slots or without"
    )
    update: Literal["mean", "sum"] = Field("mean", description="of a slot's inputs: weighted mean, or sum over N")
    qkv_bias: bool = False
    norm_eps: float = Field(1e-5, gt=0, description="of the LayerNorms; 1e-3 in the original's Keras")


class MultiHeadSection(SlotAttentionSection):
    """Several heads, in either published meaning."""

    kind: Literal["heads"]  # type: ignore[assignment]
    heads: PositiveInt = 4
    dim_head: PositiveInt = 64
    competition: Literal["per_head", "joint"] = Field(
        "per_head", description="a softmax over the slots of each head, or of all heads together"
    )


class CodebookSection(Section):
    """MetaSlot: slots with the same prototype become one (Liu et al. 2025)."""

    size: PositiveInt = Field(1024, description="prototypes")
    decay: float = Field(0.9, gt=0, lt=1, description="of the prototypes' running means")
    noise: float = Field(0.5, ge=0, description="on the inputs of the first iteration; none in the last")
    commitment: float = Field(0.0, ge=0, description="weight of the slots' squared distance to their prototypes")


class GateSection(Section):
    """A gate decides for each slot whether the image needs it (AdaSlot, Fan et al. 2024)."""

    keep_bias: float = Field(0.0, description="initial logit of keeping a slot")
    exploration: float = Field(0.0, ge=0, lt=0.5, description="least probability of keeping, and of dropping")
    gradient: Literal["slope", "difference"] = Field(
        "slope", description="of the error by a decision: its slope, as published, or the difference it makes"
    )


class BroadcastSection(Section):
    """Spatial broadcast to the image's size, or to one cell for each patch."""

    kind: Literal["broadcast"] = "broadcast"
    channels: PositiveInt = 32
    layers: PositiveInt = 3
    kernel: PositiveInt = 5
    output_kernel: PositiveInt = 3
    patch: PositiveInt = Field(1, description="pixels a side that one cell becomes")
    mask: Literal["pixel", "cell"] = Field("pixel", description="a mask logit for each pixel, or each cell")
    mixture_eps: float = Field(1e-5, ge=0, description="of the gate's mixture, as published; 0: the exact limit")


class UpsamplingSection(Section):
    """Spatial broadcast to a small canvas and transposed convolutions, as published for CLEVR."""

    kind: Literal["upsampling"]
    channels: PositiveInt = 64
    strides: tuple[PositiveInt, ...] = Field((2, 2, 2, 2, 1), min_length=1)
    kernel: PositiveInt = 5
    output_kernel: PositiveInt = 3
    mixture_eps: float = Field(1e-5, ge=0, description="of the gate's mixture, as published; 0: the exact limit")


class MLPSection(Section):
    """An MLP on each patch of a backbone's features."""

    kind: Literal["mlp"]
    hidden_dim: PositiveInt = 1024
    layers: PositiveInt = 3
    mixture_eps: float = Field(1e-5, ge=0, description="of the gate's mixture, as published; 0: the exact limit")


class TransformerSection(Section):
    """An autoregressive transformer over a backbone's features."""

    kind: Literal["transformer"]
    dim: PositiveInt | None = Field(None, description="width; null: the features'")
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    hidden_dim: PositiveInt | None = Field(None, description="of the MLPs; null: four times the width")


Encoder = Annotated[
    Annotated[ConvEncoderSection, Tag("conv")] | Annotated[ViTEncoderSection, Tag("vit")], kind_or("conv")
]
Attention = Annotated[
    Annotated[SlotAttentionSection, Tag("slots")] | Annotated[MultiHeadSection, Tag("heads")], kind_or("slots")
]
Decoder = Annotated[
    Annotated[BroadcastSection, Tag("broadcast")]
    | Annotated[UpsamplingSection, Tag("upsampling")]
    | Annotated[MLPSection, Tag("mlp")]
    | Annotated[TransformerSection, Tag("transformer")],
    kind_or("broadcast"),
]


class ModelSection(Section):
    """The autoencoder; the defaults are the published Tetrominoes model (Locatello et al. 2020)."""

    image_size: PositiveInt = Field(35, description="pixels a side")
    num_slots: PositiveInt = Field(4, description="K, the most objects (and background) that an image can have")
    slot_dim: PositiveInt = 64
    encoder: Encoder = ConvEncoderSection()
    attention: Attention = SlotAttentionSection()
    codebook: CodebookSection | None = None
    gate: GateSection | None = None
    decoder: Decoder = BroadcastSection()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.codebook is not None and self.gate is not None:
            raise ValueError("codebook: it decides which slots are kept, and so does gate; set one of the two to null")
        of_features = self.decoder.kind in ("mlp", "transformer")
        if of_features != (self.encoder.kind == "vit"):
            choice = "mlp or transformer" if self.encoder.kind == "vit" else "broadcast or upsampling"
            raise ValueError(
                f"decoder: {self.decoder.kind!r} does not go with encoder.kind {self.encoder.kind!r}; take {choice}"
            )
        if self.gate is not None and self.gate.gradient == "difference" and self.decoder.kind == "transformer":
            raise ValueError("gate: gradient 'difference' needs a decoder that mixes pictures; take 'slope'")
        return self
