"""The order of work of slot attention's iterations: the same maths, little memory, derivatives of any order."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_oracles import distance, gradient_distance, gradients, published_slot_attention, randomise
from torch import Tensor
from torch.func import functional_call

from slot_models import MultiHeadSlotAttention, SlotAttention
from slot_models.iterations import blocks, derivative, plain
from slot_models.iterations.weights import absorbing

Attention = SlotAttention | MultiHeadSlotAttention


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(heads: int = 1, joint: bool = False, dim_head: int = 12, **options: Any) -> Attention:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"iters": 3, "hidden_dim": 7, "eps": 1e-3} | options
    attention: Attention = (
        SlotAttention(4, 6, **sizes)
        if heads == 1
        else MultiHeadSlotAttention(4, 6, heads, dim_head, competition="joint" if joint else "per_head", **sizes)
    )
    attention = attention.double()
    randomise(attention)
    return attention


kinds = pytest.mark.parametrize(("heads", "joint"), [(1, False), (2, False), (2, True)])


@kinds
@given(
    block=st.integers(1, 20_000),
    batch=st.integers(1, 5),
    count=st.integers(1, 40),
    update=st.sampled_from(["mean", "sum"]),
)
@settings(max_examples=20, deadline=None)
def test_however_the_inputs_are_cut_into_blocks(
    heads: int, joint: bool, block: int, batch: int, count: int, update: Any
) -> None:
    attention = build(heads, joint, update=update, input_dim=5, qkv_bias=True)
    assert attention._rules(4).absorb
    inputs, slots = normal(batch, count, 5).requires_grad_(), normal(batch, 4, 6, seed=3).requires_grad_()
    inputs_that_count = normal(batch, count, seed=4) > -1
    inputs_that_count[:, 0] = True
    weights = dict(attention.named_parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", block)
        ours = attention(inputs, slots=slots, input_mask=inputs_that_count)
        leaves = {name: weight for name, weight in weights.items() if not name.startswith("slots_")}
        leaves |= {"inputs": inputs, "slots": slots}
        mine = gradients(ours.square().sum(), leaves)
    oracle = published_slot_attention(
        weights,
        inputs,
        slots,
        3,
        eps=1e-3,
        heads=heads,
        joint=joint,
        total=update == "sum",
        input_mask=inputs_that_count,
    )
    assert distance(ours, oracle) <= 1e-10
    assert gradient_distance(mine, gradients(oracle.square().sum(), leaves)) <= 1e-10


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_many_narrow_heads_project_the_inputs_and_agree_too(joint: bool, qkv_bias: bool) -> None:
    attention = build(6, joint, dim_head=2, qkv_bias=qkv_bias, input_dim=24)
    assert not attention._rules(4).absorb
    inputs, slots = normal(3, 11, 24).requires_grad_(), normal(3, 4, 6, seed=3)
    weights = dict(attention.named_parameters())
    ours = attention(inputs, slots=slots)
    oracle = published_slot_attention(weights, inputs, slots, 3, eps=1e-3, heads=6, joint=joint)
    assert distance(ours, oracle) <= 1e-10
    leaves = {name: w for name, w in weights.items() if not name.startswith("slots_")} | {"inputs": inputs}
    found = (gradients(slots.square().sum(), leaves) for slots in (ours, oracle))
    assert gradient_distance(*found) <= 1e-10


def test_one_head_never_projects_the_inputs_unless_slots_outnumber_channels() -> None:
    for width in (32, 64, 256, 512):
        assert absorbing(3, heads=1, slots=width // 4, width=width, head_width=width)
        assert not absorbing(3, heads=1, slots=2 * width, width=width, head_width=width)


@kinds
def test_of_the_inputs_size_the_normed_ones_and_the_attention_are_kept(heads: int, joint: bool) -> None:
    attention, inputs = build(heads, joint), normal(2, 5000, 6).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        attention(inputs)
    large = [tensor for tensor in kept if tensor.numel() >= 5000]
    others = [tuple(tensor.shape) for tensor in large if tensor.data_ptr() != inputs.data_ptr()]
    assert len(others) < len(large)
    of_each_iteration, mean_and_deviation = [(2, 4 * heads, 5000)] * 3, [(2, 5000)] * 2
    assert sorted(others) == sorted([(2, 6, 5000), *of_each_iteration, *mean_and_deviation])


@kinds
def test_second_derivatives(heads: int, joint: bool) -> None:
    attention = build(heads, joint, input_dim=3, iters=2)
    names, weights = zip(*attention.named_parameters(), strict=True)

    def function(inputs: Tensor, noise: Tensor, *values: Tensor) -> Any:
        return functional_call(attention, dict(zip(names, values, strict=True)), (inputs,), {"noise": noise})

    for inputs in (normal(2, 5, 3), normal(2, 3, 5).mT):  # as tokens, and as an encoder's channels
        arguments = (inputs.requires_grad_(), normal(2, 4, 6, seed=3).requires_grad_(), *weights)
        assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@kinds
@pytest.mark.parametrize("wanted", ["inputs", "weights", "slots"])
def test_gradients_of_some_are_those_of_all(heads: int, joint: bool, wanted: str) -> None:
    """Frozen inputs, frozen weights: nothing is asked for that is not wanted."""
    attention, inputs, slots = build(heads, joint), normal(2, 9, 6).requires_grad_(), normal(2, 4, 6).requires_grad_()
    leaves = {name: w for name, w in attention.named_parameters() if not name.startswith("slots_")}
    leaves |= {"inputs": inputs, "slots": slots}
    every = gradients(attention(inputs, slots=slots).square().sum(), leaves)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted or (wanted == "weights" and name not in ("inputs", "slots")))
    chosen = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    some = gradients(attention(inputs, slots=slots).square().sum(), chosen)
    assert some.keys() == chosen.keys()
    assert gradient_distance(some, {name: every[name] for name in some}) <= 1e-12


@kinds
def test_functional_and_compiled_gradients_are_the_same(heads: int, joint: bool) -> None:
    attention, inputs = build(heads, joint), normal(2, 9, 6)
    weights = dict(attention.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(attention, weights, (inputs,)).square().sum()
        return result

    expected = gradients(loss(weights), weights)
    attention.checks_values = False  # which looks at values
    assert gradient_distance(torch.func.grad(loss)(weights), expected) <= 1e-10
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")(inputs)
    assert gradient_distance(gradients(compiled.square().sum(), weights), expected) <= 1e-10


@kinds
def test_a_step_under_no_grad_is_the_same_step(heads: int, joint: bool) -> None:
    attention, inputs = build(heads, joint), normal(2, 9, 6)
    with torch.no_grad():
        found = attention(inputs)
    assert torch.equal(found, attention(inputs)) and not found.requires_grad
    assert torch.equal(found, attention(inputs.requires_grad_()))


def test_an_image_without_any_slot_stays_finite_where_products_are_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.set_float32_matmul_precision("medium") makes them on some processors."""
    attention, inputs = build().float(), normal(2, 9, 6).float().requires_grad_()
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: product(*(part.bfloat16().float() for part in (a, b))))
    slots_that_compete = torch.tensor([[False] * 4, [True, False, True, True]])
    result = attention(inputs, slot_mask=slots_that_compete)
    result.sum().backward()
    assert result.isfinite().all() and inputs.grad is not None and inputs.grad.isfinite().all()


def test_inputs_far_from_zero_lose_no_more_than_their_own_rounding() -> None:
    """What the LayerNorm of the inputs subtracts must not drown what is left."""
    for offset in (0.0, 10.0, 1000.0):
        attention, inputs, slots = build(), normal(2, 400, 6) + offset, normal(2, 4, 6, seed=3)
        inputs = inputs.float().double()  # what float32 holds of them is what is compared
        exact = attention(inputs, slots=slots)
        single = attention.float()(inputs.float(), slots=slots.float())
        assert distance(single, exact) <= 1e-5 * max(offset, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_in_half_precision_are_read_as_they_are(dtype: torch.dtype) -> None:
    attention, slots = build().float(), normal(2, 4, 6, seed=3).float()
    inputs = normal(2, 400, 6).to(dtype).requires_grad_()
    same = inputs.detach().float().requires_grad_()
    found, expected = attention(inputs, slots=slots), attention(same, slots=slots)
    assert torch.equal(found, expected)
    for result in (found, expected):
        result.square().sum().backward()
    assert inputs.grad is not None and inputs.grad.dtype == dtype
    assert torch.equal(inputs.grad, same.grad.to(dtype))


def test_the_hand_written_derivative_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for module, name in ((derivative, "_backward"), (plain, "iterate")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=function, _n=name, **k: (called.append(_n), _f(*a, **k))[1])
    build()(normal(2, 9, 6)).sum().backward()
    assert called == ["_backward"]
