"""CLEVR's decoder against transposed convolutions written out."""

from typing import Any

import numpy as np
import pytest
import torch
from convolution_oracles import same_convolution, same_transposed
from slot_oracles import distance, gradient_distance, gradients, randomise
from torch import Tensor
from torch.nn import functional

from slot_models.positions import coordinates
from slot_models.same_padding import TurnedConvTranspose2d
from slot_models.upsampling_decoder import UpsamplingBroadcastDecoder


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("height", "width", "kernel", "stride"),
    [(8, 8, 5, 2), (3, 4, 5, 2), (3, 4, 3, 2), (4, 3, 5, 1), (4, 3, 3, 1), (2, 3, 5, 3), (2, 3, 3, 3), (1, 1, 5, 2)],
)
def test_transposed_convolution_is_tensorflows(height: int, width: int, kernel: int, stride: int) -> None:
    layer = TurnedConvTranspose2d(3, 2, kernel, stride).double()
    image = normal(3, height, width)
    weight = layer.weight.detach().numpy()  # [3, 2, k, k]
    expected = same_transposed(image.numpy(), weight, stride)
    ours = (layer(image[None].flip(2, 3)).flip(2, 3)[0] - layer.bias[:, None, None]).detach().numpy()
    assert ours.shape == (2, height * stride, width * stride)
    np.testing.assert_allclose(ours, expected, atol=1e-12)

    # the oracle is an adjoint: <image, conv(other)> = <transposed(image), other>
    other = normal(2, height * stride, width * stride, seed=3).numpy()
    forward = (same_convolution(other, weight, stride) * image.numpy()).sum()
    assert forward == pytest.approx((expected * other).sum(), abs=1e-10)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (4, 5), (4, 1), (2, 1)])
def test_a_kernel_that_does_not_fit_its_stride_is_named(kernel: int, stride: int) -> None:
    with pytest.raises(ValueError, match=rf"^kernel: {kernel} is "):
        TurnedConvTranspose2d(3, 2, kernel, stride)


@pytest.mark.parametrize(
    ("size", "strides", "kernel"), [((8, 4), (2, 2, 1), 5), ((6, 9), (3,), 3), ((4, 4), (1, 2), 3)]
)
def test_the_decoder_is_broadcast_position_and_transposed_convolutions(
    size: tuple[int, int], strides: tuple[int, ...], kernel: int
) -> None:
    torch.manual_seed(0)
    decoder = UpsamplingBroadcastDecoder(5, size, 4, strides, kernel).double()
    randomise(decoder)
    weights = {name: parameter.detach().numpy() for name, parameter in decoder.named_parameters()}
    slots = normal(2, 3, 5)
    pictures, logits = (part.detach().numpy() for part in decoder.decode(slots))
    height, width = (side // int(np.prod(strides)) for side in size)
    for image in range(2):
        for slot in range(3):
            hidden = np.zeros((5, height, width))
            for row, column in np.ndindex(height, width):
                y, x = row / max(height - 1, 1), column / max(width - 1, 1)
                code = weights["position.weight"] @ [y, x, 1 - y, 1 - x] + weights["position.bias"]
                hidden[:, row, column] = slots[image, slot].numpy() + code
            for layer, stride in enumerate((*strides, 1)):
                hidden = same_transposed(hidden, weights[f"layers.{2 * layer}.weight"], stride)
                hidden += weights[f"layers.{2 * layer}.bias"][:, None, None]
                hidden = hidden if layer == len(strides) else hidden.clip(min=0)
            np.testing.assert_allclose(pictures[image, slot], hidden[:3], atol=1e-9)
            np.testing.assert_allclose(logits[image, slot], hidden[3], atol=1e-9)


@pytest.mark.parametrize(
    ("size", "strides", "kernel"),
    [((16, 16), (2, 2, 1), 5), ((8, 4), (1, 2), 5), ((6, 9), (3, 1), 3), ((12, 8), (4,), 7), ((4, 6), (2, 1), 3)],
)
def test_without_the_grid_values_and_gradients_are_those_of_upsampling_every_slot(
    size: tuple[int, int], strides: tuple[int, ...], kernel: int
) -> None:
    torch.manual_seed(0)
    decoder = UpsamplingBroadcastDecoder(5, size, 4, strides, kernel).double()
    randomise(decoder)
    weights, slots = dict(decoder.named_parameters()), normal(2, 3, 5).requires_grad_()

    code = coordinates(*decoder.grid).double() @ weights["position.weight"].T + weights["position.bias"]
    hidden = slots.flatten(0, 1)[:, :, None, None] + code.permute(2, 0, 1)
    for layer, stride in enumerate((*strides, 1)):
        weight, bias = weights[f"layers.{2 * layer}.weight"], weights[f"layers.{2 * layer}.bias"]
        before = max(weight.shape[-1] - stride, 0) // 2  # of what is too much, the odd row and column are the last
        height, width = (stride * side for side in hidden.shape[-2:])
        hidden = functional.conv_transpose2d(hidden, weight, bias, stride, padding=before)[..., :height, :width]
        hidden = hidden if layer == len(strides) else hidden.relu()
    expected = hidden[:, :3].unflatten(0, (2, 3)), hidden[:, 3].unflatten(0, (2, 3))

    leaves, found = weights | {"slots": slots}, decoder.decode(slots)
    assert all(distance(mine, theirs) <= 1e-12 for mine, theirs in zip(found, expected, strict=True))
    mine, theirs = (
        gradients(sum((part * normal(*part.shape, seed=4)).sum() for part in parts), leaves)
        for parts in (found, expected)
    )
    assert mine.keys() == leaves.keys()
    assert gradient_distance(mine, theirs) <= 1e-12


def test_the_published_clevr_decoder() -> None:
    with torch.device("meta"):
        decoder = UpsamplingBroadcastDecoder(64)
        decoded = decoder(torch.empty(2, 7, 64), torch.ones(2, 7))
    assert decoder.grid == (8, 8) and decoded.reconstruction.shape == (2, 3, 128, 128)
    shapes = [tuple(parameter.shape) for name, parameter in decoder.named_parameters() if name.startswith("layers")]
    assert shapes == [(64, 64, 5, 5), (64,)] * 5 + [(64, 4, 3, 3), (4,)]
    strides = [layer.stride for layer in decoder.layers if isinstance(layer, TurnedConvTranspose2d)]
    assert strides == [(2, 2)] * 4 + [(1, 1)] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 4},
        {"kernel": 1},
        {"output_kernel": 0},
        {"strides": ()},
        {"strides": (0,)},
        {"strides": (3,)},
        {"channels": 0},
        {"image_size": 0},
        {"slot_dim": -1},
    ],
    ids=str,
)
def test_a_size_that_does_not_fit_is_named(options: Any) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}: "):
        UpsamplingBroadcastDecoder(**{"slot_dim": 8, "image_size": 16, "strides": (2, 2)} | options)
