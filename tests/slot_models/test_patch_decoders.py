"""The MLP decoder of patch features against the unfactorised formula."""

from typing import Any

import pytest
import torch
from decoder_cases import assert_equal, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_oracles import randomise
from torch import Tensor

from slot_models.patch_decoders import MLPPatchDecoder


def plain(weights: dict[str, Tensor], slots: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Slot by slot, patch by patch: the MLP of slot + position (Seitzer et al. 2023, section 3.2)."""
    layers = [(weights["first_weight"], weights["first_bias"])]
    while f"rest.{2 * len(layers) - 2}.weight" in weights:
        name = f"rest.{2 * len(layers) - 2}"
        layers.append((weights[f"{name}.weight"], weights[f"{name}.bias"]))
    pictures = []
    for slot in slots.flatten(0, 1):
        patches = []
        for position in weights["position"]:
            hidden = slot + position
            for weight, bias in layers[:-1]:
                hidden = (weight @ hidden + bias).clamp(min=0)
            patches.append(layers[-1][0] @ hidden + layers[-1][1])
        pictures.append(torch.stack(patches, dim=1).unflatten(1, (-1, width)))  # [F + 1, h, w]
    whole = torch.stack(pictures).unflatten(0, slots.shape[:2])
    return whole[:, :, :-1], whole[:, :, -1]


@settings(max_examples=20)
@given(
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    slot_dim=st.integers(1, 6),
    features=st.integers(1, 5),
    hidden_dim=st.integers(2, 7),
    layers=st.integers(1, 4),
    num_slots=st.integers(1, 4),
)
def test_the_factorised_decoder_equals_the_plain_one(
    height: int, width: int, slot_dim: int, features: int, hidden_dim: int, layers: int, num_slots: int
) -> None:
    torch.manual_seed(0)
    decoder = MLPPatchDecoder(slot_dim, features, (height, width), hidden_dim, layers).double()
    randomise(decoder)
    slots = normal(2, num_slots, slot_dim).requires_grad_()
    weights = dict(decoder.named_parameters())
    ours, expected = decoder.decode(slots), plain(weights, slots, width)
    assert_equal(ours, expected, weights | {"slots": slots})


def test_the_published_decoder_of_dino_features() -> None:
    with torch.device("meta"):
        decoder = MLPPatchDecoder(128, 768, 14)
        decoded = decoder(torch.empty(2, 11, 128), torch.ones(2, 11))
    assert decoded.reconstruction.shape == (2, 768, 14, 14) and decoded.masks.shape == (2, 11, 14, 14)
    matrices = [128 * 1024, 1024 * 1024, 1024 * 1024, 1024 * 769]
    biases = [1024, 1024, 1024, 769]
    assert sum(parameter.numel() for parameter in decoder.parameters()) == sum(matrices + biases) + 196 * 128


@pytest.mark.parametrize("name", ["slot_dim", "features", "grid", "hidden_dim", "layers"])
@pytest.mark.parametrize("value", [0, -2])
def test_a_size_that_is_not_positive_is_named(name: str, value: int) -> None:
    sizes: dict[str, Any] = {"slot_dim": 4, "features": 3, "grid": 2, "hidden_dim": 5, "layers": 2}
    with pytest.raises(ValueError, match=f"^{name}: {value} is not positive"):
        MLPPatchDecoder(**sizes | {name: value})
