"""The encoders against convolutions, ramp, LayerNorm and MLP written out."""

from typing import Any

import numpy as np
import pytest
import torch
from convolution_oracles import same_convolution
from slot_oracles import distance, gradient_distance, gradients, randomise
from torch import Tensor
from torch.nn import functional

from slot_models.encoders import ConvEncoder, FeatureEncoder
from slot_models.positions import coordinates
from slot_models.same_padding import SameConv2d


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(weights: dict[str, Tensor], ramp: Tensor, images: Tensor, strides: tuple[int, ...], padding: str) -> Tensor:
    """Position by position, in row order: convolutions, linear ramp, LayerNorm, MLP."""
    features = images
    for layer, stride in enumerate(strides):
        weight, bias = weights[f"convolutions.{2 * layer}.weight"], weights[f"convolutions.{2 * layer}.bias"]
        # a stride keeps each stride-th result of stride one, from the first window on that the padding allows
        full = functional.conv2d(features, weight, bias, padding="same").clamp(min=0)
        kernel = weight.shape[-1]
        first = 0 if padding == "centred" else kernel // 2 - max(kernel - stride, 0) // 2
        features = full[:, :, first::stride, first::stride]
    height, width = features.shape[-2:]
    positions = []
    for row in range(height):
        for column in range(width):
            code = weights["position.weight"] @ ramp[row, column] + weights["position.bias"]
            here = features[:, :, row, column] + code
            here = functional.layer_norm(here, here.shape[-1:], weights["norm.weight"], weights["norm.bias"])
            here = (here @ weights["mlp.0.weight"].T + weights["mlp.0.bias"]).clamp(min=0)
            positions.append(here @ weights["mlp.2.weight"].T + weights["mlp.2.bias"])
    return torch.stack(positions, dim=1)


@pytest.mark.parametrize("padding", ["same", "centred"])
@pytest.mark.parametrize(
    ("size", "kernel", "strides"),
    [
        (7, 5, (1, 1)),
        (6, 3, (2, 1)),
        (12, 5, (2, 3)),
        (9, 5, (3, 1)),
        (8, 3, (2, 2, 2)),
        (5, 1, (5,)),
        (4, 7, (1,)),
        ((6, 9), 3, (3, 1)),
    ],
)
def test_features_and_gradients_equal_the_plain_encoder(
    size: Any, kernel: int, strides: tuple[int, ...], padding: Any
) -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder(size, 6, kernel, strides, padding).double()
    images = normal(2, 3, *encoder.image_size).requires_grad_()
    randomise(encoder)
    weights = dict(encoder.named_parameters())
    ours, expected = encoder(images), plain(weights, encoder.coordinates, images, strides, padding)
    assert ours.shape == (2, encoder.grid[0] * encoder.grid[1], encoder.dim)
    assert distance(ours, expected) <= 1e-12
    direction, leaves = normal(*ours.shape, seed=4), weights | {"images": images}
    mine, theirs = (gradients((features * direction).sum(), leaves) for features in (ours, expected))
    assert mine.keys() == leaves.keys()
    assert gradient_distance(mine, theirs) <= 1e-10


@pytest.mark.parametrize(
    ("size", "kernel", "stride"),
    [(6, 5, 1), (8, 5, 2), (6, 3, 2), (6, 1, 2), (9, 5, 3), (9, 3, 3), (8, 5, 4), (10, 3, 5), (4, 7, 2)],
)
def test_same_convolution_is_tensorflows(size: int, kernel: int, stride: int) -> None:
    layer = SameConv2d(3, 2, kernel, stride).double()
    image = normal(3, size, 2 * size)
    expected = same_convolution(image.numpy(), layer.weight.detach().numpy(), stride)
    ours = (layer(image[None])[0] - layer.bias[:, None, None]).detach().numpy()
    assert ours.shape == (2, size // stride, 2 * size // stride)
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_the_two_paddings_differ_under_strides_alone() -> None:
    for strides, equal in (((1, 1), True), ((2, 1), False)):
        encoders = []
        for padding in ("same", "centred"):
            torch.manual_seed(0)
            encoders.append(ConvEncoder(8, 4, 5, strides, padding).double())
        encoders[1].load_state_dict(encoders[0].state_dict())
        images = normal(1, 3, 8, 8)
        assert torch.allclose(encoders[0](images), encoders[1](images)) == equal


@pytest.mark.parametrize(
    ("size", "channels", "strides", "grid"),
    [(35, 32, (1, 1, 1, 1), 35), (21, 8, (3, 1), 7), (128, 64, (1, 2, 2, 1), 32), (128, 64, (1, 1, 1, 1), 128)],
)
def test_strides_divide_the_image_into_the_published_grids(
    size: int, channels: int, strides: tuple[int, ...], grid: int
) -> None:
    with torch.device("meta"):
        encoder = ConvEncoder(size, channels, strides=strides)
        assert encoder(torch.empty(1, 3, size, size)).shape == (1, grid**2, channels)
    assert encoder.grid == (grid, grid)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 5), (7, 4)])
def test_coordinates_are_the_four_way_ramp(height: int, width: int) -> None:
    ramp = coordinates(height, width)
    assert ramp.shape == (height, width, 4) and ramp.dtype == torch.float32
    for row in range(height):
        for column in range(width):
            y, x = row / (height - 1), column / (width - 1)
            assert distance(ramp[row, column], torch.tensor([y, x, 1 - y, 1 - x])) <= 1e-6


def test_the_feature_encoder_is_layer_norm_and_two_linear_layers() -> None:
    torch.manual_seed(0)
    encoder, features = FeatureEncoder(6, 4).double(), normal(2, 5, 6)
    randomise(encoder)
    weights = {name: parameter.detach() for name, parameter in encoder.named_parameters()}
    centred = features - features.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    hidden = (normed * weights["mlp.0.weight"] + weights["mlp.0.bias"]) @ weights["mlp.1.weight"].T
    hidden = (hidden + weights["mlp.1.bias"]).clamp(min=0)
    assert distance(encoder(features), hidden @ weights["mlp.3.weight"].T + weights["mlp.3.bias"]) <= 1e-12
    assert encoder.dim == 4


@pytest.mark.parametrize(
    ("encoder", "inputs"), [(ConvEncoder(8, 8, 3, (2, 1)), (2, 3, 8, 8)), (FeatureEncoder(6, 8), (2, 5, 6))]
)
def test_an_encoder_can_be_differentiated_exported_and_run_in_bf16(encoder: Any, inputs: tuple[int, ...]) -> None:
    batch = normal(*inputs).float()
    encoder(batch).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in encoder.parameters())

    shapes = {next(iter(encoder.forward.__annotations__)): {0: torch.export.Dim("batch")}}
    exported = torch.export.export(encoder, (batch,), dynamic_shapes=shapes).module()
    more = normal(5, *inputs[1:], seed=3).float()
    assert distance(exported(more), encoder(more)) <= 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(more)
    assert rounded.dtype == torch.bfloat16 and distance(rounded.float(), encoder(more)) <= 2e-2


def test_fresh_kernels_are_glorot_uniform_and_fresh_biases_zero() -> None:
    torch.manual_seed(0)
    for name, parameter in ConvEncoder(35).named_parameters():
        if "bias" in name:
            assert parameter.count_nonzero() == 0
        elif not name.startswith("norm"):
            fans = (parameter.shape[0] + parameter.shape[1]) * parameter[0, 0].numel()
            assert 0.95 * (6 / fans) ** 0.5 < parameter.abs().max() <= (6 / fans) ** 0.5, name


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 4},
        {"kernel": -1},
        {"kernel": 0},
        {"strides": (2, 1)},
        {"strides": (3, 2)},
        {"strides": ()},
        {"strides": (1, 0)},
        {"strides": (-1,)},
        {"channels": 0},
        {"image_size": 0},
        {"image_size": (21, 20), "strides": (3,)},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_a_size_that_does_not_fit_is_named(options: Any) -> None:
    name = list(options)[-1]
    with pytest.raises(ValueError, match=f"^{name}: "):
        ConvEncoder(**{"image_size": 21} | options)


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (2, 3, 9, 8), (2, 1, 8, 8), (2, 4, 8, 8), (3, 8, 8), (2, 8, 8, 3)])
def test_images_of_another_shape_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^images: shape \(.*\) is not \[B, 3, 8, 8\]"):
        ConvEncoder(8, 4)(torch.zeros(shape))


def test_features_of_another_width_and_empty_widths_are_named() -> None:
    with pytest.raises(ValueError, match=r"^features: shape \(2, 5, 7\) is not \[B, N, 6\]"):
        FeatureEncoder(6, 4)(torch.zeros(2, 5, 7))
    for name, sizes in {"in_dim": (0, 4), "dim": (4, 0)}.items():
        with pytest.raises(ValueError, match=f"^{name}: 0 is not positive"):
            FeatureEncoder(*sizes)
