"""The autoregressive decoder against torch's own transformer layers, and what it may see."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_oracles import distance, randomise
from torch import Tensor, nn
from torch.nn import functional

from slot_models.mixture import kept_softmax
from slot_models.transformer_decoder import TransformerDecoder


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(seed: int = 0, grid: tuple[int, int] = (3, 2), layers: int = 2, heads: int = 2) -> TransformerDecoder:
    torch.manual_seed(seed)
    decoder = TransformerDecoder(5, 4, grid, 4 * heads, layers, heads, 12).double()
    randomise(decoder, seed)
    return decoder


def torch_layer(block: Any, dim: int, heads: int) -> nn.TransformerDecoderLayer:
    """torch's pre-LN layer with a block's weights."""
    layer = nn.TransformerDecoderLayer(dim, heads, 12, dropout=0.0, batch_first=True, norm_first=True).double().eval()
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(block.self_attention.to_all.weight)
        layer.self_attn.out_proj.weight.copy_(block.self_attention.combine.weight)
        reading = block.slot_attention
        layer.multihead_attn.in_proj_weight.copy_(torch.cat([reading.to_query.weight, reading.to_key_value.weight]))
        layer.multihead_attn.out_proj.weight.copy_(reading.combine.weight)
        for attention in (layer.self_attn, layer.multihead_attn):
            attention.in_proj_bias.zero_()
            attention.out_proj.bias.zero_()
        for theirs, ours in (
            (layer.norm1, block.norm_self),
            (layer.norm2, block.norm_slots),
            (layer.norm3, block.norm_mlp),
            (layer.linear1, block.mlp[0]),
            (layer.linear2, block.mlp[2]),
        ):
            theirs.load_state_dict(ours.state_dict())
    return layer


def reference(decoder: TransformerDecoder, slots: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """One image through torch's layers: slots [K, D], target [F, h, w] -> reconstruction, masks of the last layer."""
    heads, dim = decoder.blocks[0].self_attention.heads, decoder.first.shape[0]
    memory = functional.linear(slots, decoder.embed_slots[0].weight)
    memory = functional.layer_norm(memory, (dim,), decoder.embed_slots[1].weight, decoder.embed_slots[1].bias)[None]
    tokens = target.flatten(1).T  # [N, F], in row order
    shifted = functional.linear(tokens, decoder.embed_features.weight, decoder.embed_features.bias).roll(1, dims=0)
    shifted[0] = decoder.first
    hidden = (shifted + decoder.position)[None]
    causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for block in decoder.blocks:
        layer = torch_layer(block, dim, heads)
        seen = hidden + layer._sa_block(layer.norm1(hidden), causal, None)
        queries = layer.norm2(seen)
        masks = layer.multihead_attn(queries, memory, memory, need_weights=True)[1]  # [1, N, K], mean over heads
        hidden = layer(hidden, memory, tgt_mask=causal)
    hidden = functional.layer_norm(hidden[0], (dim,), decoder.norm.weight, decoder.norm.bias)
    patches = hidden @ decoder.output.weight.T + decoder.output.bias
    return patches.T.reshape(target.shape), masks[0].T.reshape(-1, *target.shape[1:])


@pytest.mark.parametrize("kept", [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0]])
@pytest.mark.parametrize(("grid", "layers", "heads"), [((3, 2), 2, 2), ((1, 4), 1, 1), ((2, 2), 3, 4)])
def test_the_decoder_is_torchs_on_the_kept_slots_alone(
    grid: tuple[int, int], layers: int, heads: int, kept: list[int]
) -> None:
    decoder = build(1, grid, layers, heads)
    slots, target, keep = normal(2, 4, 5), normal(2, 4, *grid, seed=3), torch.tensor([kept, [1, 1, 1, 1]]).double()
    with torch.no_grad():
        decoded = decoder(slots, keep, target)
        for image in range(2):
            inside = keep[image] > 0
            reconstruction, masks = reference(decoder, slots[image, inside], target[image])
            assert distance(decoded.reconstruction[image], reconstruction) <= 1e-10
            assert distance(decoded.masks[image, inside], masks) <= 1e-10
            assert (decoded.masks[image, ~inside] == 0).all()


@settings(max_examples=15)
@given(height=st.integers(1, 4), width=st.integers(1, 4), data=st.data())
def test_a_patch_is_predicted_from_those_before_it_alone(height: int, width: int, data: st.DataObject) -> None:
    decoder, place = build(0, (height, width)), data.draw(st.integers(0, height * width - 1))
    slots, keep, target = normal(1, 3, 5), torch.ones(1, 3), normal(1, 4, height, width)
    changed = target.flatten(2).clone()
    changed[:, :, place:] = 7 * normal(1, 4, height * width - place, seed=9)
    with torch.no_grad():
        first = decoder(slots, keep, target).reconstruction.flatten(2)
        second = decoder(slots, keep, changed.view_as(target)).reconstruction.flatten(2)
    assert distance(second[:, :, : place + 1], first[:, :, : place + 1]) <= 1e-12
    for later in range(place + 1, height * width):
        assert distance(second[:, :, later], first[:, :, later]) > 1e-6


@settings(max_examples=30)
@given(
    logits=st.lists(st.floats(-500, 500), min_size=1, max_size=6),
    data=st.data(),
)
def test_kept_softmax_is_the_softmax_of_the_kept_however_large_the_dropped(
    logits: list[float], data: st.DataObject
) -> None:
    keep = data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)))
    values = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    kept = torch.tensor(keep)
    gate = kept.double().requires_grad_()
    weights = kept_softmax(values, gate, dim=-1)
    assert (weights[~kept] == 0).all()
    if any(keep):
        assert torch.allclose(weights[kept], values[kept].softmax(dim=0), atol=1e-12, rtol=1e-12)
    grads = torch.autograd.grad((weights * torch.arange(1.0, len(logits) + 1)).sum(), (values, gate))
    assert all(grad.isfinite().all() for grad in grads) and (grads[0][~kept] == 0).all()


def test_the_slope_of_keeping_a_slot_is_that_of_the_renormalised_softmax() -> None:
    logits, keep = normal(3, 5), torch.tensor([[1.0, 0, 1, 0, 1]] * 3, dtype=torch.float64)

    def plain(keep: Tensor) -> Tensor:
        share = logits.softmax(dim=-1) * keep
        return share / share.sum(dim=-1, keepdim=True)

    ours, expected = (
        torch.autograd.functional.jacobian(function, keep)
        for function in (lambda k: kept_softmax(logits, k, dim=-1), plain)
    )
    assert distance(ours, expected) <= 1e-12


def test_a_missing_target_and_one_of_another_shape_are_named() -> None:
    decoder = build()
    slots, keep = normal(2, 3, 5), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^target: it is missing"):
        decoder(slots, keep)
    for shape in ((2, 4, 2, 3), (2, 3, 3, 2), (1, 4, 3, 2), (2, 4, 6)):
        with pytest.raises(ValueError, match=r"^target: shape \(.*\) is not \[2, 4, 3, 2\]"):
            decoder(slots, keep, normal(*shape))


@pytest.mark.parametrize("name", ["slot_dim", "features", "grid", "dim", "layers", "heads", "hidden_dim"])
def test_a_size_that_is_not_positive_is_named(name: str) -> None:
    sizes: dict[str, Any] = {"slot_dim": 4, "features": 3, "grid": 2, "dim": 4}
    with pytest.raises(ValueError, match=f"^{name}: 0 is not positive"):
        TransformerDecoder(**sizes | {name: 0})


def test_heads_that_do_not_divide_the_width_are_named() -> None:
    with pytest.raises(ValueError, match=r"^heads: 3 does not divide dim 4"):
        TransformerDecoder(4, 4, 2, heads=3)
