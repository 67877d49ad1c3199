"""Heads, masks, biases, updates and gradients of slot attention: one oracle, and what must hold for each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_oracles import distance, gradient_distance, gradients, published_slot_attention, randomise
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call

from slot_models import MultiHeadSlotAttention, SlotAttention

Attention = SlotAttention | MultiHeadSlotAttention


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_head(iters: int = 2, **options: Any) -> SlotAttention:
    return SlotAttention(4, 6, iters, hidden_dim=7, **options)


def per_head(iters: int = 2, **options: Any) -> MultiHeadSlotAttention:
    return MultiHeadSlotAttention(4, 6, 3, 5, iters, hidden_dim=7, **options)


def joint(iters: int = 2, **options: Any) -> MultiHeadSlotAttention:
    return MultiHeadSlotAttention(4, 6, 2, 5, iters, hidden_dim=7, competition="joint", **options)


KINDS: dict[str, tuple[Callable[..., Attention], dict[str, Any]]] = {
    "one head": (one_head, {}),
    "per head": (per_head, {"heads": 3}),
    "joint": (joint, {"heads": 2, "joint": True}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, seed: int = 1, **options: Any) -> Attention:
    torch.manual_seed(seed)
    attention = KINDS[kind][0](**options).double()
    randomise(attention, seed)
    return attention


def masks_of(batch: int, inputs: int, num_slots: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    found = {"input_mask": (batch, inputs), "slot_mask": (batch, num_slots)}
    masks = {name: torch.rand(shape, generator=generator) < 0.6 for name, shape in found.items()}
    for mask in masks.values():
        mask[:, 1] = True
    return masks


@kinds
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("update", ["mean", "sum"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_outputs_and_gradients_equal_the_equations(kind: str, qkv_bias: bool, update: Any, masked: bool) -> None:
    attention = build(kind, input_dim=5, qkv_bias=qkv_bias, update=update, eps=1e-3)
    inputs, slots = normal(3, 11, 5).requires_grad_(), normal(3, 4, 6, seed=3).requires_grad_()
    masks = masks_of(3, 11, 4) if masked else {}
    weights = dict(attention.named_parameters())
    ours = attention(inputs, slots=slots, **masks)
    oracle = published_slot_attention(
        weights, inputs, slots, 2, eps=1e-3, total=update == "sum", **KINDS[kind][1], **masks
    )
    counted = masks["slot_mask"][..., None] if masked else torch.ones(3, 4, 1)
    assert distance(ours * counted, oracle * counted) <= 1e-10

    direction = normal(*ours.shape, seed=4) * counted
    leaves = {name: w for name, w in weights.items() if not name.startswith("slots_")}
    leaves |= {"inputs": inputs, "slots": slots}
    mine, theirs = (gradients((found * direction).sum(), leaves) for found in (ours, oracle))
    assert mine.keys() == leaves.keys()
    assert gradient_distance(mine, theirs) <= 1e-10


@kinds
@pytest.mark.parametrize("update", ["mean", "sum"])
def test_gradients_pass_gradcheck(kind: str, update: Any) -> None:
    attention = build(kind, input_dim=3, qkv_bias=True, update=update)
    names, weights = zip(*attention.named_parameters(), strict=True)
    masks = masks_of(2, 5, 4)

    def function(inputs: Tensor, noise: Tensor, *values: Tensor) -> Any:
        weights = dict(zip(names, values, strict=True))
        return functional_call(attention, weights, (inputs,), {"noise": noise, "return_attention": True} | masks)

    arguments = (normal(2, 5, 3).requires_grad_(), normal(2, 4, 6, seed=3).requires_grad_(), *weights)
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)


@kinds
@pytest.mark.parametrize("update", ["mean", "sum"])
@given(slots=st.permutations(range(4)), inputs=st.permutations(range(9)))
@settings(max_examples=10, deadline=None)
def test_permutations_of_slots_and_inputs(kind: str, update: Any, slots: list[int], inputs: list[int]) -> None:
    attention, features, noise = build(kind, update=update), normal(2, 9, 6), normal(2, 4, 6, seed=3)
    found, attended = attention(features, noise=noise, return_attention=True)
    moved, moved_attended = attention(features[:, inputs], noise=noise[:, slots], return_attention=True)
    assert distance(moved, found[:, slots]) <= 1e-12
    assert distance(moved_attended, attended[:, slots][:, :, inputs]) <= 1e-12


@kinds
@pytest.mark.parametrize("update", ["mean", "sum"])
@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_masked_inputs_have_no_effect_and_win_nothing(kind: str, update: Any, seed: int) -> None:
    attention, inputs = build(kind, update=update), normal(2, 9, 6, seed=seed)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[:, seed % 9] = True
    found, attended = attention(inputs, input_mask=mask, return_attention=True)
    for junk in (1e6, torch.inf, torch.nan):
        other = torch.where(mask[..., None], inputs, junk).requires_grad_()
        slots = attention(other, input_mask=mask)
        assert torch.equal(slots, found)
        slots.sum().backward()
        assert other.grad is not None and (other.grad[~mask] == 0).all() and other.grad.isfinite().all()
    assert (attended.transpose(1, 2)[~mask] == 0).all()
    assert distance(attended.sum(dim=1), mask.double()) <= 1e-12


@kinds
def test_an_image_without_any_input_is_finite(kind: str) -> None:
    attention, mask = build(kind), torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    inputs = normal(2, 9, 6).requires_grad_()
    slots = attention(inputs, input_mask=mask)
    assert slots.isfinite().all() and distance(slots[:1], attention(inputs[:1])) <= 1e-12
    slots.sum().backward()
    assert inputs.grad is not None and inputs.grad.isfinite().all()


@pytest.mark.parametrize("heads", [1, 2, 3, 8])
@pytest.mark.parametrize("competition", ["per_head", "joint"])
def test_a_masked_slot_has_no_attention_and_no_effect(competition: Any, heads: int) -> None:
    torch.manual_seed(0)
    attention = MultiHeadSlotAttention(5, 6, heads, 4, competition=competition).double()
    mask = torch.tensor([[True, False, True, True, False], [False, False, False, True, False]])
    inputs, slots = normal(2, 9, 6), normal(2, 5, 6, seed=3)
    found, attended = attention(inputs, slots=slots, slot_mask=mask, return_attention=True)
    changed = torch.where(mask[..., None], slots, 50 * normal(2, 5, 6, seed=5))
    other, _ = attention(inputs, slots=changed, slot_mask=mask, return_attention=True)
    assert torch.equal(other[mask], found[mask])
    assert (attended[~mask] == 0).all() and distance(attended.sum(dim=1), torch.ones(2, 9)) <= 1e-12
    alone = attention(inputs[:1], slots=slots[:1, [0, 2, 3]])
    assert distance(found[0, [0, 2, 3]], alone[0]) <= 1e-12


@kinds
def test_attention_is_that_of_the_last_iteration(kind: str) -> None:
    attention, inputs, noise = build(kind), normal(2, 9, 6), normal(2, 4, 6, seed=3)
    found, attended = attention(inputs, noise=noise, return_attention=True)
    assert torch.equal(found, attention(inputs, noise=noise))
    assert attended.shape == (2, 4, 9) and distance(attended.sum(dim=1), torch.ones(2, 9)) <= 1e-12
    weights = dict(attention.named_parameters())
    before = published_slot_attention(weights, inputs, attention.initial_slots(2, 4, noise), 1, **KINDS[kind][1])
    normed = nn.functional.layer_norm(inputs, (6,), weights["norm_inputs.weight"], weights["norm_inputs.bias"])
    queries = nn.functional.layer_norm(before, (6,), weights["norm_slots.weight"], weights["norm_slots.bias"])
    heads, joint = KINDS[kind][1].get("heads", 1), KINDS[kind][1].get("joint", False)
    q, k = (queries @ weights["to_query"].T).chunk(heads, -1), (normed @ weights["to_key"].T).chunk(heads, -1)
    logits = torch.stack([a @ b.mT / a.shape[-1] ** 0.5 for a, b in zip(q, k, strict=True)])  # [H, B, K, N]
    if joint:
        expected = logits.permute(1, 0, 2, 3).flatten(1, 2).softmax(dim=1).unflatten(1, (heads, 4)).sum(dim=1)
    else:
        expected = logits.softmax(dim=2).mean(dim=0)
    assert distance(attended, expected) <= 1e-10


@kinds
@pytest.mark.parametrize("iters", [1, 3])
def test_implicit_has_the_value_of_full_and_the_gradient_of_the_last_iteration(kind: str, iters: int) -> None:
    attention, full = build(kind, gradient="implicit", iters=iters), build(kind, iters=iters)
    inputs, noise = normal(2, 9, 6).requires_grad_(), normal(2, 4, 6, seed=3)
    slots = attention(inputs, noise=noise)
    assert torch.equal(slots, full(inputs, noise=noise))
    weights = dict(attention.named_parameters())
    with torch.no_grad():
        initial = attention.initial_slots(2, 4, noise)
        before = published_slot_attention(weights, inputs, initial, iters - 1, **KINDS[kind][1])
    direction = normal(*slots.shape, seed=4)
    last = published_slot_attention(weights, inputs, before, 1, **KINDS[kind][1])
    learned = {name: weight for name, weight in weights.items() if not name.startswith("slots_")}
    expected = gradients((last * direction).sum(), learned | {"inputs": inputs})
    actual = gradients((slots * direction).sum(), weights | {"inputs": inputs})
    assert actual.keys() == weights.keys() | {"inputs"}
    for name in ("slots_mu", "slots_log_sigma"):  # a gradient of zero, not none
        assert actual.pop(name).count_nonzero() == 0
    assert gradient_distance(actual, expected) <= 1e-10


def test_a_sum_keeps_what_share_of_the_inputs_a_slot_won() -> None:
    """The same input over and over: a mean pools it whole, a sum pools the share that the slot won."""
    mean, total = build("one head", iters=1), build("one head", iters=1, update="sum")
    inputs = normal(1, 1, 6).expand(1, 20, 6)
    slots = normal(1, 3, 6, seed=3)
    assert not torch.equal(mean(inputs, slots=slots), total(inputs, slots=slots))
    assert distance(mean(inputs[:, :1], slots=slots), mean(inputs, slots=slots)) <= 1e-6
    assert distance(total(inputs[:, :1], slots=slots), total(inputs, slots=slots)) <= 1e-12


# Which parameters a variant does not move, because nothing depends on them: they get a gradient of zero. The softmax
# over slots does not see what all slots share.
FROZEN: dict[tuple[str, str], set[str]] = {
    **{(kind, gradient): set() for kind in KINDS for gradient in ("full", "bilevel")},
    **{(kind, "implicit"): {"slots_mu", "slots_log_sigma"} for kind in KINDS},
}


@pytest.mark.parametrize(("kind", "gradient"), FROZEN)
@pytest.mark.parametrize("initial", ["shared", "per_slot"])
def test_every_parameter_gets_a_gradient_in_every_variant(kind: str, gradient: Any, initial: Any) -> None:
    attention = build(kind, gradient=gradient, initial=initial, qkv_bias=True)
    attention(normal(2, 9, 6), noise=normal(2, 4, 6, seed=3)).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in attention.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    assert {name for name, grad in grads.items() if grad.count_nonzero() == 0} == FROZEN[kind, gradient]


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 1000.0], ids=["flat", "fresh", "peaked"])
@pytest.mark.parametrize("update", ["mean", "sum"])
def test_autocast_stays_near_float32(kind: str, dtype: torch.dtype, sharpness: float, update: Any) -> None:
    torch.manual_seed(0)
    options: Any = {"input_dim": 32, "hidden_dim": 64, "update": update}
    attention: Attention = (
        SlotAttention(5, 32, **options)
        if kind == "one head"
        else MultiHeadSlotAttention(5, 32, 2, 16, competition="joint" if kind == "joint" else "per_head", **options)
    )
    # Inputs in five bunches, and slots that start near them: what peaked attention looks like in a trained model
    bunches = torch.randn(5, 32)
    inputs = bunches[torch.arange(4096) % 5] + 0.1 * torch.randn(2, 4096, 32)
    with torch.no_grad():
        attention.to_query.copy_(torch.eye(*attention.to_query.shape))
        attention.to_key.copy_(sharpness * torch.eye(*attention.to_key.shape))
    slots = bunches.expand(2, 5, 32)
    expected = attention(inputs, slots=slots)
    with torch.autocast("cpu", dtype=dtype):
        found = attention(inputs, slots=slots)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert distance(found, expected) <= 1e-2
    found.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in attention.parameters())


@kinds
def test_the_module_exports_with_a_dynamic_batch_and_number_of_inputs(kind: str) -> None:
    attention, inputs = build(kind), normal(3, 9, 6)
    dynamic = {"inputs": {0: Dim("batch"), 1: Dim("inputs")}}
    program = torch.export.export(attention, (inputs,), dynamic_shapes=dynamic).module()
    for batch, count in ((3, 9), (7, 20)):
        other = normal(batch, count, 6, seed=5)
        assert distance(program(other), attention(other)) <= 1e-12


@kinds
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["inputs", "slots", "noise"])
def test_a_value_that_is_not_finite_is_named(kind: str, name: str, value: float) -> None:
    arguments = {"inputs": normal(2, 9, 6), "slots": normal(2, 4, 6), "noise": normal(2, 4, 6)}
    del arguments["noise" if name == "slots" else "slots"]
    arguments[name][1, 2, 3] = value
    with pytest.raises(ValueError, match=f"^{name}: it holds NaN or infinity"):
        build(kind)(**arguments)


@kinds
def test_weights_that_are_not_finite_are_no_fault_of_the_inputs(kind: str) -> None:
    attention = build(kind)
    with torch.no_grad():
        attention.to_key[0, 0] = torch.nan
    assert attention(normal(2, 9, 6)).isnan().any()


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("input_mask", torch.ones(2, 8, dtype=torch.bool)),
        ("input_mask", torch.ones(9, dtype=torch.bool)),
        ("slot_mask", torch.ones(2, 5, dtype=torch.bool)),
        ("input_noise", torch.zeros(2, 3, 9, 6)),
        ("input_noise", torch.zeros(2, 9, 6)),
    ],
)
def test_an_argument_that_does_not_fit_is_named(name: str, argument: Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{name}: shape "):
        build("one head")(normal(2, 9, 6), **{name: argument})


@pytest.mark.parametrize(("name", "size"), [("input_mask", 9), ("slot_mask", 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_mask_of_another_dtype_is_named(name: str, size: int, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"^{name}: dtype {dtype} is not torch.bool"):
        build("one head")(normal(2, 9, 6), **{name: torch.ones(2, size, dtype=dtype)})


@pytest.mark.parametrize("name", ["heads", "dim_head"])
def test_a_head_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: 0 is not positive"):
        MultiHeadSlotAttention(4, 8, **{name: 0})
