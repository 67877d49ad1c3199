"""The spatial broadcast decoder against the plain one that computes every position of every slot."""

from typing import Any

import pytest
import torch
from decoder_cases import assert_equal, normal
from slot_oracles import distance, randomise
from torch import Tensor
from torch.nn import functional

from slot_models.decoders import SpatialBroadcastDecoder

# The spatial broadcast decoder. (height, width), kernel, output_kernel, layers, patch, channels, slot_dim
SIZES = [
    ((1, 1), 1, 1, 1, 1, 2, 3),
    ((3, 3), 3, 1, 2, 4, 4, 5),
    ((5, 5), 5, 3, 1, 1, 3, 4),
    ((5, 8), 5, 3, 2, 2, 3, 4),
    ((6, 6), 5, 3, 3, 2, 6, 4),
    ((7, 7), 3, 1, 2, 3, 8, 8),
    ((7, 7), 7, 5, 2, 1, 3, 6),
    ((8, 8), 1, 3, 2, 2, 4, 4),
    ((9, 9), 5, 5, 2, 3, 5, 7),
    ((12, 7), 7, 1, 2, 1, 4, 4),
]


def spatial(sizes: tuple[Any, ...], mask: Any = "pixel") -> SpatialBroadcastDecoder:
    grid, kernel, output_kernel, layers, patch, channels, slot_dim = sizes
    torch.manual_seed(0)
    decoder = SpatialBroadcastDecoder(slot_dim, grid, channels, layers, kernel, output_kernel, patch, mask).double()
    randomise(decoder)
    return decoder


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
        hidden = (slot + code).permute(2, 0, 1)  # [D, h, w]
        for weight, bias in kernels:
            hidden = functional.conv2d(hidden[None], weight, bias, padding="same")[0].clamp(min=0)
        cells = functional.conv2d(hidden[None], weights["output.weight"], weights["output.bias"], padding="same")[0]
        image = torch.empty(4, ramp.shape[0] * patch, ramp.shape[1] * patch, dtype=slots.dtype)
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
def test_the_factorised_decoder_equals_the_plain_one(sizes: tuple[Any, ...], mask: str) -> None:
    decoder, slots = spatial(sizes, mask), normal(2, 3, sizes[-1]).requires_grad_()
    weights = dict(decoder.named_parameters())
    ours, expected = decoder.decode(slots), plain(weights, decoder.coordinates, slots, sizes[4], mask)
    assert_equal(ours, expected, weights | {"slots": slots})


@pytest.mark.parametrize("mask", ["pixel", "cell"])
def test_the_reconstruction_mixes_the_pictures_by_the_published_formula(mask: str) -> None:
    decoder, slots, keep = spatial(SIZES[3], mask), normal(2, 4, 4), torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 0]])
    decoded = decoder(slots, keep.double())
    pictures, logits = plain(dict(decoder.named_parameters()), decoder.coordinates, slots, 2, mask)
    alpha = logits.exp() / logits.exp().sum(dim=1, keepdim=True) * keep[:, :, None, None]
    alpha = alpha / (alpha.sum(dim=1, keepdim=True) + 1e-5)
    assert distance(decoded.masks, alpha) <= 1e-10
    assert distance(decoded.reconstruction, sum(alpha[:, k, None] * pictures[:, k] for k in range(4))) <= 1e-10


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
    decoded = decoder(torch.randn(1, 4, 64), torch.ones(1, 4))
    assert decoded.pictures.shape == (1, 4, 3, 35, 35) and decoded.mask_logits.shape == (1, 4, 35, 35)


def test_fresh_kernels_are_glorot_uniform_and_fresh_biases_zero() -> None:
    torch.manual_seed(0)
    for name, parameter in SpatialBroadcastDecoder(64, 35).named_parameters():
        if "bias" in name:
            assert parameter.count_nonzero() == 0
        else:
            fans = (parameter.shape[0] + parameter.shape[1]) * parameter[0, 0].numel()
            assert 0.95 * (6 / fans) ** 0.5 < parameter.abs().max() <= (6 / fans) ** 0.5, name


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 4},
        {"kernel": 9},
        {"kernel": -1},
        {"kernel": 3, "output_kernel": 2},
        {"layers": 0},
        {"channels": 0},
        {"patch": 0},
        {"mask": "image"},
        {"slot_dim": 0},
        {"grid": 0},
    ],
    ids=str,
)
def test_a_size_that_does_not_fit_is_named(options: Any) -> None:
    name, value = list(options.items())[-1]
    with pytest.raises(ValueError, match=f"^{name}: {value!r} "):
        SpatialBroadcastDecoder(**{"slot_dim": 8, "grid": 7} | options)
