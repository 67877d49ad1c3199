"""The decoder against the plain one that broadcasts every slot over the grid and convolves it."""

from typing import Any

import pytest
import torch
from slot_oracles import distance, gradient_distance, gradients, randomise
from torch import Tensor
from torch.nn import functional

from slot_models import SpatialBroadcastDecoder

# grid, kernel, output_kernel, layers, patch, channels, slot_dim
SIZES = [
    (1, 1, 1, 1, 1, 2, 3),
    (3, 3, 1, 2, 4, 4, 5),
    (5, 5, 3, 1, 1, 3, 4),
    (6, 5, 3, 3, 2, 6, 4),
    (7, 3, 1, 2, 3, 8, 8),
    (7, 7, 5, 2, 1, 3, 6),
    (8, 1, 3, 2, 2, 4, 4),
    (9, 5, 5, 2, 3, 5, 7),
    (12, 7, 1, 2, 1, 4, 4),
]


def build(sizes: tuple[int, ...], mask: Any = "pixel") -> SpatialBroadcastDecoder:
    grid, kernel, output_kernel, layers, patch, channels, slot_dim = sizes
    torch.manual_seed(0)
    decoder = SpatialBroadcastDecoder(slot_dim, grid, channels, layers, kernel, output_kernel, patch, mask).double()
    randomise(decoder)
    return decoder


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(weights: dict[str, Tensor], ramp: Tensor, slots: Tensor, patch: int, mask: str) -> tuple[Tensor, Tensor]:
    """One slot at a time (Watters et al. 2019; Locatello et al. 2020): broadcast, position, convolutions, patches."""
    code = ramp @ weights["position.weight"].T + weights["position.bias"]
    kernels = [(weights["first_weight"], weights["first_bias"])]
    layer = 0
    while f"hidden.{layer}.weight" in weights:
        kernels.append((weights[f"hidden.{layer}.weight"], weights[f"hidden.{layer}.bias"]))
        layer += 2
    images = []
    for slot in slots.flatten(0, 1):
        hidden = (slot + code).permute(2, 0, 1)  # [D, G, G]
        for weight, bias in kernels:
            hidden = functional.conv2d(hidden[None], weight, bias, padding="same")[0].clamp(min=0)
        cells = functional.conv2d(hidden[None], weights["output.weight"], weights["output.bias"], padding="same")[0]
        image = torch.empty(4, len(ramp) * patch, len(ramp) * patch, dtype=slots.dtype)
        for down in range(patch):
            for right in range(patch):  # channel c p^2 + down p + right is pixel (down, right) of each cell
                colours = cells[: 3 * patch**2]
                image[:3, down::patch, right::patch] = colours[down * patch + right :: patch**2]
                image[3, down::patch, right::patch] = cells[3 * patch**2 + (down * patch + right) * (mask == "pixel")]
        images.append(image)
    pixels = torch.stack(images).unflatten(0, slots.shape[:2])
    return pixels[:, :, :3], pixels[:, :, 3]


@pytest.mark.parametrize("mask", ["pixel", "cell"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_factorised_decoder_equals_the_plain_one(sizes: tuple[int, ...], mask: str) -> None:
    decoder, slots = build(sizes, mask), normal(2, 3, sizes[-1]).requires_grad_()
    weights = dict(decoder.named_parameters())
    ours, expected = decoder(slots), plain(weights, decoder.coordinates, slots, sizes[4], mask)
    for mine, theirs in zip(ours, expected, strict=True):
        assert distance(mine, theirs) <= 1e-12

    directions = [normal(*part.shape, seed=4) for part in ours]
    leaves = weights | {"slots": slots}
    mine, theirs = (
        gradients(sum((part * way).sum() for part, way in zip(parts, directions, strict=True)), leaves)
        for parts in (ours, expected)
    )
    assert mine.keys() == leaves.keys()
    assert gradient_distance(mine, theirs) <= 1e-10


@pytest.mark.parametrize("mask", ["pixel", "cell"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_pictures_and_mask_logits_have_the_size_of_the_image(sizes: tuple[int, ...], mask: str) -> None:
    pictures, mask_logits = build(sizes, mask)(normal(2, 5, sizes[-1]))
    side = sizes[0] * sizes[4]
    assert pictures.shape == (2, 5, 3, side, side) and mask_logits.shape == (2, 5, side, side)


def test_each_slot_is_decoded_on_its_own() -> None:
    decoder, slots = build((7, 3, 1, 2, 3, 8, 8)), normal(2, 4, 8)
    for whole, flat in zip(decoder(slots), decoder(slots.reshape(8, 1, 8)), strict=True):
        assert distance(flat.reshape(whole.shape), whole) <= 1e-12


def test_the_published_tetrominoes_decoder() -> None:
    decoder = SpatialBroadcastDecoder(64, 35)
    assert {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()} == {
        "position.weight": (64, 4),
        "position.bias": (64,),
        "first_weight": (32, 64, 5, 5),
        "first_bias": (32,),
        "hidden.0.weight": (32, 32, 5, 5),
        "hidden.0.bias": (32,),
        "hidden.2.weight": (32, 32, 5, 5),
        "hidden.2.bias": (32,),
        "output.weight": (4, 32, 3, 3),
        "output.bias": (4,),
    }
    pictures, mask_logits = decoder(torch.randn(1, 4, 64))
    assert pictures.shape == (1, 4, 3, 35, 35) and mask_logits.shape == (1, 4, 35, 35)


def test_fresh_kernels_are_glorot_uniform_and_fresh_biases_zero() -> None:
    torch.manual_seed(0)
    for name, parameter in SpatialBroadcastDecoder(64, 35).named_parameters():
        if "bias" in name:
            assert parameter.count_nonzero() == 0
        else:
            fans = (parameter.shape[0] + parameter.shape[1]) * parameter[0, 0].numel()
            assert 0.95 * (6 / fans) ** 0.5 < parameter.abs().max() <= (6 / fans) ** 0.5, name


@pytest.mark.parametrize(
    ("name", "options"),
    [("kernel", {"kernel": 4}), ("kernel", {"kernel": 9}), ("output_kernel", {"output_kernel": 2, "kernel": 3})],
)
def test_a_kernel_that_does_not_fit_is_named(name: str, options: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {options[name]} "):
        SpatialBroadcastDecoder(8, 7, **options)
