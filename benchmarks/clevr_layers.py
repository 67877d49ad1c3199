"""The layers of CLEVR's autoencoder, each with tensors of its own and in every form at hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from slot_models import SlotAutoencoder, build_autoencoder
from slot_models.encoders import ConvEncoder
from slot_models.mixture import masked_mixture
from slot_models.same_padding import TurnedConvTranspose2d
from slot_models.upsampling_decoder import UpsamplingBroadcastDecoder


@dataclass(frozen=True)
class Setting:
    """What is measured, and where: ``matmul`` is the side of the matrices, ``repeats`` of every time taken."""

    device: str
    image_size: int
    channels: int
    batch: int
    num_slots: int
    strides: tuple[int, ...]
    matmul: int
    repeats: int

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


CLEVR = Setting("cuda", 128, 64, 64, 7, (2, 2, 2, 2, 1), 8192, 10)
SMALL = Setting("cpu", 16, 8, 2, 3, (2, 2, 1), 64, 1)

Form = Callable[..., Tensor]


@dataclass(frozen=True)
class Layer:
    """A part of a training step.

    Fields:
        name: what it is.
        inputs: makes what a form is given first; only when it is wanted, since all layers' would fill the memory.
        weights: what a form is given after that.
        own: weights that a form has of itself.
        forms: by name, functions of inputs and weights that do the same.
    """

    name: str
    inputs: Callable[[], list[Tensor]]
    weights: Sequence[Tensor]
    own: Sequence[Tensor]
    forms: dict[str, Form]


def clevr(setting: Setting) -> SlotAutoencoder:
    """The published model (Locatello et al. 2020), fresh from seed 0."""
    torch.manual_seed(0)
    return build_autoencoder(
        image_size=setting.image_size,
        num_slots=setting.num_slots,
        slot_dim=setting.channels,
        encoder={"kind": "conv", "channels": setting.channels},
        decoder={"kind": "upsampling", "channels": setting.channels, "strides": setting.strides},
    ).to(setting.device)


def layers(model: SlotAutoencoder, setting: Setting) -> list[Layer]:
    """All of a step's forward and backward pass, in order."""
    encoder, attention, decoder = model.encoder, model.slot_attention, model.decoder
    assert isinstance(encoder, ConvEncoder) and isinstance(decoder, UpsamplingBroadcastDecoder)
    batch, slots, size, width = setting.batch, setting.num_slots, setting.image_size, setting.channels

    def given(*shape: int, gradient: bool = True) -> Callable[[], list[Tensor]]:
        return lambda: [draw(setting, *shape).requires_grad_(gradient)]

    def in_model(forward: Form) -> dict[str, Form]:
        def form(inputs: Tensor) -> Tensor:
            with torch.autocast(setting.device, torch.bfloat16):
                return forward(inputs)

        return {"as in the model": form}

    found = []
    for number, layer in enumerate(layer for layer in encoder.convolutions if isinstance(layer, nn.Conv2d)):
        images = given(batch, layer.in_channels, size, size, gradient=number > 0)
        name = f"encoder, convolution {number + 1}"
        found.append(Layer(name, images, half(layer), [], layouts({"convolution": rectified(convolution)})))

    def positions(features: Tensor) -> Tensor:
        codes = encoder.position(encoder.coordinates)
        return encoder.mlp(encoder.norm((features.permute(0, 2, 3, 1) + codes).flatten(1, 2)))

    tail = [*encoder.position.parameters(), *encoder.norm.parameters(), *encoder.mlp.parameters()]
    found.append(Layer("encoder, positions", given(batch, width, size, size), [], tail, in_model(positions)))

    noise = torch.randn(batch, slots, width, device=setting.device)
    attend = in_model(lambda inputs: attention(inputs, noise=noise))
    found.append(Layer("slot attention", given(batch, size**2, width), [], [*attention.parameters()], attend))

    first, *rest = (layer for layer in decoder.layers if isinstance(layer, TurnedConvTranspose2d))
    broadcast = in_model(lambda slots: first(slots, decoder.position(decoder.coordinates).permute(2, 0, 1)[None]))
    own = [*decoder.position.parameters(), *first.parameters()]
    found.append(Layer("decoder, first layer", given(batch * slots, width), [], own, broadcast))

    side = decoder.grid[0] * setting.strides[0]
    for number, layer in enumerate(rest[:-1]):
        stride = int(layer.stride[0])
        plain = {"sub-pixels": sub_pixels(layer)} if stride > 1 else {"convolution": as_convolution}
        forms = {name: rectified(form) for name, form in ({"transposed": transposed(layer)} | plain).items()}
        images = given(batch * slots, width, side, side)
        found.append(Layer(f"decoder, layer {number + 2}, stride {stride}", images, half(layer), [], layouts(forms)))
        side *= stride
    forms = {"transposed": transposed(rest[-1]), "convolution": as_convolution}
    found.append(Layer("decoder, output", given(batch * slots, width, size, size), half(rest[-1]), [], layouts(forms)))

    target, keep = draw(setting, batch, 3, size, size), torch.ones(batch, slots, device=setting.device)

    def mixture(pixels: Tensor) -> Tensor:
        pixels = pixels.flip(2, 3).unflatten(0, (batch, slots)).float()
        masks = masked_mixture(pixels[:, :, 3], keep)
        return error((masks[:, :, None] * pixels[:, :, :3]).sum(dim=1), target)

    forms = {"as in the model": mixture}
    found.append(Layer("mixture and loss", given(batch * slots, 4, size, size), [], [], forms))
    return found


def error(reconstruction: Tensor, target: Tensor) -> Tensor:
    """The training loss."""
    return (reconstruction - target).square().mean()


def draw(setting: Setting, *shape: int) -> Tensor:
    """Half precision; images in channels_last order."""
    tensor = torch.randn(shape, device=setting.device, dtype=torch.bfloat16)
    return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def half(module: nn.Module) -> list[Tensor]:
    """A layer's weight and bias in half precision, as autocast has them."""
    return [weight.detach().bfloat16().requires_grad_() for weight in (module.weight, module.bias)]


# --- forms of a convolution: image [B, C, h, w], weight, bias -> image ---------------------------------------------


def layouts(forms: dict[str, Form]) -> dict[str, Form]:
    """Each form on images in channels_last order, and on contiguous ones."""

    def contiguous(form: Form) -> Form:
        return lambda image, weight, bias: form(image.contiguous(), weight, bias)

    return forms | {f"{name}, contiguous": contiguous(form) for name, form in forms.items()}


def rectified(form: Form) -> Form:
    return lambda image, weight, bias: form(image, weight, bias).relu_()


def convolution(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.conv2d(image, weight, bias, padding=weight.shape[-1] // 2)


def transposed(layer: TurnedConvTranspose2d) -> Form:
    """As the layer does it with a stride: of a turned image."""
    options = {"stride": layer.stride, "padding": layer.before, "output_padding": layer.output_padding}
    return lambda image, weight, bias: functional.conv_transpose2d(image, weight.flip(2, 3), bias, **options)


def as_convolution(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As the layer does it without a stride: of a turned image."""
    return functional.conv2d(image, weight.transpose(0, 1), bias, padding=weight.shape[-1] // 2)


def sub_pixels(layer: TurnedConvTranspose2d) -> Form:
    """A transposed convolution of a turned image as a plain one that writes a cell's pixels side by side.

    Pixel a of a cell takes tap t of the kernel from the cell at offset o where a + before - t = o stride.
    """
    stride, before, size = int(layer.stride[0]), layer.before, layer.weight.shape[-1]
    reach = max((stride - 1 + before) // stride, math.ceil((size - 1 - before) / stride))
    taps = torch.zeros(stride, 2 * reach + 1, size, device=layer.weight.device)
    for pixel in range(stride):
        for tap in range(size):
            offset, rest = divmod(pixel + before - tap, stride)
            if rest == 0:
                taps[pixel, offset + reach, size - 1 - tap] = 1  # the weight is that of upright images

    def form(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = torch.einsum("cdij,aoi,bpj->dabcop", weight, taps.to(weight), taps.to(weight)).flatten(0, 2)
        cells = functional.conv2d(image, wide, bias.repeat_interleave(stride**2), padding=reach)
        return functional.pixel_shuffle(cells, stride)

    return form
