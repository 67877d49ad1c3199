"""The encoder against convolutions, ramp, LayerNorm and MLP written out."""

from typing import Any

import pytest
import torch
from slot_oracles import distance, gradient_distance, gradients, randomise
from torch import Tensor
from torch.nn import functional

from slot_models import ConvEncoder
from slot_models.positions import coordinates


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(weights: dict[str, Tensor], ramp: Tensor, images: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Position by position, in row order: convolutions, linear ramp, LayerNorm, MLP."""
    features = images
    for layer, stride in enumerate(strides):
        weight, bias = weights[f"convolutions.{2 * layer}.weight"], weights[f"convolutions.{2 * layer}.bias"]
        full = functional.conv2d(features, weight, bias, padding="same").clamp(min=0)
        features = full[:, :, ::stride, ::stride]  # a stride keeps each stride-th result of stride one
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


@pytest.mark.parametrize(
    ("size", "kernel", "strides"),
    [(7, 5, (1, 1)), (6, 3, (2, 1)), (12, 5, (2, 3)), (9, 5, (3, 1)), (8, 3, (2, 2, 2)), (5, 1, (5,)), (4, 7, (1,))],
)
def test_features_and_gradients_equal_the_plain_encoder(size: int, kernel: int, strides: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder, images = ConvEncoder(size, 6, kernel, strides).double(), normal(2, 3, size, size).requires_grad_()
    randomise(encoder)
    weights = dict(encoder.named_parameters())
    ours, expected = encoder(images), plain(weights, encoder.coordinates, images, strides)
    assert ours.shape == (2, encoder.grid**2, encoder.dim)
    assert distance(ours, expected) <= 1e-12
    direction, leaves = normal(*ours.shape, seed=4), weights | {"images": images}
    mine, theirs = (gradients((features * direction).sum(), leaves) for features in (ours, expected))
    assert mine.keys() == leaves.keys()
    assert gradient_distance(mine, theirs) <= 1e-10


@pytest.mark.parametrize(
    ("size", "strides", "grid"),
    [(35, (1, 1, 1, 1), 35), (21, (3, 1), 7), (128, (1, 2, 2, 1), 32), (128, (1, 1, 1, 1), 128)],
)
def test_strides_divide_the_image_into_the_published_grids(size: int, strides: tuple[int, ...], grid: int) -> None:
    with torch.device("meta"):
        encoder = ConvEncoder(size, 16, strides=strides)
        assert encoder(torch.empty(1, 3, size, size)).shape == (1, grid**2, 16)
    assert encoder.grid == grid


@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 5), (7, 4)])
def test_coordinates_are_the_four_way_ramp(height: int, width: int) -> None:
    ramp = coordinates(height, width)
    assert ramp.shape == (height, width, 4) and ramp.dtype == torch.float32
    for row in range(height):
        for column in range(width):
            y, x = row / (height - 1), column / (width - 1)
            assert distance(ramp[row, column], torch.tensor([y, x, 1 - y, 1 - x])) <= 1e-6


def test_fresh_kernels_are_glorot_uniform_and_fresh_biases_zero() -> None:
    torch.manual_seed(0)
    for name, parameter in ConvEncoder(35).named_parameters():
        if "bias" in name:
            assert parameter.count_nonzero() == 0
        elif not name.startswith("norm"):
            fans = (parameter.shape[0] + parameter.shape[1]) * parameter[0, 0].numel()
            assert 0.95 * (6 / fans) ** 0.5 < parameter.abs().max() <= (6 / fans) ** 0.5, name


@pytest.mark.parametrize(
    ("name", "options"),
    [("kernel", {"kernel": 4}), ("strides", {"strides": (2, 1)}), ("strides", {"strides": (3, 2)})],
)
def test_a_size_that_does_not_fit_is_named(name: str, options: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        ConvEncoder(21, **options)
