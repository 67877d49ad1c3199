"""Slot attention against its equations and against the package slot-attention, and what must hold for any weights."""

from typing import Any

import numpy as np
import pytest
import slot_attention as package
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from slot_oracles import distance, gradient_distance, gradients, published_slot_attention, randomise
from torch import Tensor
from torch.func import functional_call

from slot_models import MultiHeadSlotAttention, SlotAttention
from slot_models.attention import fixed_noise

# batch, inputs, slots, dim, input_dim, iters, hidden_dim
SIZES = [
    (1, 5, 2, 3, 3, 1, 4),
    (2, 7, 3, 8, 5, 2, 16),
    (3, 20, 5, 16, 24, 3, 8),
    (1, 64, 7, 64, 32, 3, 128),
    (4, 9, 1, 6, 6, 3, 12),
    (2, 3, 11, 12, 12, 5, 24),
]


def build(dim: int = 8, num_slots: int = 4, seed: int = 1, **options: Any) -> SlotAttention:
    torch.manual_seed(seed)
    attention = SlotAttention(num_slots, dim, **options).double()
    randomise(attention, seed)
    return attention


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(attention: SlotAttention, noise: Tensor) -> Tensor:
    return attention.slots_mu + attention.slots_log_sigma.exp() * noise


@pytest.mark.parametrize("norm_eps", [1e-5, 1e-3])
@pytest.mark.parametrize("initial", ["shared", "per_slot"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outputs_and_gradients_equal_the_published_equations(sizes, initial, norm_eps) -> None:  # type: ignore[no-untyped-def]
    batch, count, num_slots, dim, input_dim, iters, hidden_dim = sizes
    attention = build(
        dim, num_slots, iters=iters, hidden_dim=hidden_dim, input_dim=input_dim, initial=initial, norm_eps=norm_eps
    )
    inputs, noise = normal(batch, count, input_dim).requires_grad_(), normal(batch, num_slots, dim, seed=3)
    weights = dict(attention.named_parameters())
    ours = attention(inputs, noise=noise)
    oracle = published_slot_attention(weights, inputs, drawn(attention, noise), iters, norm_eps=norm_eps)
    assert distance(ours, oracle) <= 1e-10

    direction = normal(*ours.shape, seed=4)
    leaves = weights | {"inputs": inputs}
    mine, theirs = (gradients((slots * direction).sum(), leaves) for slots in (ours, oracle))
    assert mine.keys() == leaves.keys()
    assert gradient_distance(mine, theirs) <= 1e-10


@pytest.mark.parametrize("dim", [4, 32, 64])
@pytest.mark.parametrize(("batch", "count", "num_slots", "iters"), [(1, 6, 2, 1), (3, 17, 5, 3), (2, 4, 9, 4)])
def test_outputs_and_gradients_equal_the_package_slot_attention(
    dim: int, batch: int, count: int, num_slots: int, iters: int
) -> None:
    ours = build(dim, num_slots, iters=iters, hidden_dim=2 * dim)
    theirs = package.SlotAttention(num_slots, dim, iters, hidden_dim=2 * dim).double()
    pairs = {  # the package's name: ours; its biases of q, k and v have no counterpart and are zero
        "slots_mu": "slots_mu",
        "slots_logsigma": "slots_log_sigma",
        **{f"to_{short}.weight": f"to_{name}" for short, name in (("q", "query"), ("k", "key"), ("v", "value"))},
        **{f"gru.{part}_{gate}": f"gru.{part}_{gate}" for part in ("weight", "bias") for gate in ("ih", "hh")},
    }
    for part in ("weight", "bias"):
        pairs |= {f"norm_input.{part}": f"norm_inputs.{part}", f"norm_slots.{part}": f"norm_slots.{part}"}
        pairs |= {f"norm_pre_ff.{part}": f"mlp.0.{part}", f"mlp.0.{part}": f"mlp.1.{part}"}
        pairs |= {f"mlp.2.{part}": f"mlp.3.{part}"}
    my_leaves, their_leaves = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert set(pairs.values()) == set(my_leaves)
    assert set(their_leaves) - set(pairs) == {"to_q.bias", "to_k.bias", "to_v.bias"}
    with torch.no_grad():
        for name, parameter in their_leaves.items():
            parameter.copy_(my_leaves[pairs[name]].view_as(parameter) if name in pairs else torch.zeros(()))

    inputs = normal(batch, count, dim).requires_grad_()
    for called_with in (None, num_slots + 2):
        torch.manual_seed(5)
        noise = torch.randn(batch, called_with or num_slots, dim, dtype=torch.float64)
        torch.manual_seed(5)
        expected = theirs(inputs, num_slots=called_with)
        actual = ours(inputs, called_with, noise=noise)
        assert distance(actual, expected) <= 1e-10

        direction = normal(*actual.shape, seed=6)
        mine = gradients((actual * direction).sum(), my_leaves | {"inputs": inputs})
        wanted = gradients((expected * direction).sum(), their_leaves | {"inputs": inputs})
        renamed = {name: wanted[their_name].view_as(mine[name]) for their_name, name in pairs.items()}
        assert gradient_distance(mine, renamed | {"inputs": wanted["inputs"]}) <= 1e-10


def test_gradients_pass_gradcheck() -> None:
    attention = build(4, 3, iters=2, hidden_dim=5, input_dim=3)
    names, weights = zip(*attention.named_parameters(), strict=True)

    def function(inputs: Tensor, noise: Tensor, *values: Tensor) -> Tensor:
        return functional_call(attention, dict(zip(names, values, strict=True)), (inputs,), {"noise": noise})

    arguments = (normal(2, 5, 3).requires_grad_(), normal(2, 3, 4, seed=3).requires_grad_(), *weights)
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("gradient", ["full", "bilevel"])
@given(order=st.permutations(range(6)))
@settings(max_examples=15, deadline=None)
def test_permuting_the_noise_permutes_the_slots(gradient: Any, order: list[int]) -> None:
    attention, inputs, noise = build(num_slots=6, gradient=gradient), normal(2, 9, 8), normal(2, 6, 8, seed=3)
    slots = attention(inputs, noise=noise)
    assert distance(attention(inputs, noise=noise[:, order]), slots[:, order]) <= 1e-12


@pytest.mark.parametrize("initial", ["shared", "per_slot"])
@given(order=st.permutations(range(9)))
@settings(max_examples=15, deadline=None)
def test_permuting_the_inputs_changes_nothing(initial: Any, order: list[int]) -> None:
    attention, inputs = build(initial=initial), normal(2, 9, 8)
    assert distance(attention(inputs[:, order]), attention(inputs)) <= 1e-12


def test_slots_of_equal_noise_stay_equal_and_others_do_not() -> None:
    noise = normal(1, 3, 8)
    noise[:, 1] = noise[:, 0]
    slots = build(num_slots=3)(normal(1, 9, 8), noise=noise)[0]
    assert distance(slots[1], slots[0]) <= 1e-12 < distance(slots[2], slots[0])


@pytest.mark.parametrize("initial", ["shared", "per_slot"])
def test_without_noise_a_result_depends_on_the_image_alone(initial: Any) -> None:
    attention, inputs = build(initial=initial), normal(5, 9, 8)
    torch.manual_seed(0)
    state, slots = torch.get_rng_state(), attention(inputs)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(attention.train()(inputs), slots) and torch.equal(attention.eval()(inputs), slots)
    for row in range(5):
        assert distance(attention(inputs[row : row + 1])[0], slots[row]) <= 1e-12
    assert distance(attention(inputs.flip(0)).flip(0), slots) <= 1e-12


@given(seed=st.integers(0, 2**32), few=st.integers(1, 8), more=st.integers(0, 8), dim=st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_a_row_of_the_fixed_noise_does_not_depend_on_the_number_of_slots(
    seed: int, few: int, more: int, dim: int
) -> None:
    rows = fixed_noise(few + more, dim, seed)
    assert rows.dtype == torch.float32 and rows.shape == (few + more, dim)
    assert torch.equal(rows[:few], fixed_noise(few, dim, seed))
    assert len({tuple(row.tolist()) for row in rows}) == few + more
    assert not torch.equal(rows, fixed_noise(few + more, dim, seed + 1))


def test_the_fixed_noise_is_standard_normal() -> None:
    noise = fixed_noise(200, 100).double().numpy()
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert abs((noise[1:] * noise[:-1]).mean()) < 4 / np.sqrt(noise[1:].size)


def test_the_seed_keys_the_fixed_noise() -> None:
    inputs = normal(2, 9, 8)
    first, other = build(seed=1), SlotAttention(4, 8, seed=9).double()
    other.load_state_dict(first.state_dict())
    noise = fixed_noise(4, 8, 9).double().expand(2, -1, -1)
    assert torch.equal(other(inputs), first(inputs, noise=noise))
    assert not torch.equal(other(inputs), first(inputs))


def test_initial_slots_can_be_given_outright_in_any_number() -> None:
    attention, inputs, noise = build(), normal(2, 9, 8), normal(2, 7, 8, seed=3)
    given_slots = attention(inputs, slots=drawn(attention, noise))
    assert torch.equal(given_slots, attention(inputs, 7, noise=noise))


@pytest.mark.parametrize("initial", ["shared", "per_slot"])
@pytest.mark.parametrize("iters", [1, 2, 4])
def test_bilevel_has_the_value_of_full_and_the_gradient_of_the_last_iteration(iters: int, initial: Any) -> None:
    attention = build(iters=iters, initial=initial, gradient="bilevel")
    full = build(iters=iters, initial=initial)
    full.load_state_dict(attention.state_dict())
    inputs, noise = normal(2, 9, 8).requires_grad_(), normal(2, 4, 8, seed=3)
    slots = attention(inputs, noise=noise)
    assert torch.equal(slots, full(inputs, noise=noise))

    # The equations where the slots before the last iteration are a constant, and the gradient that reaches this
    # constant goes straight to the initial slots.
    weights = dict(attention.named_parameters())
    leaves, direction = weights | {"inputs": inputs}, normal(*slots.shape, seed=4)
    with torch.no_grad():
        before = published_slot_attention(weights, inputs, drawn(attention, noise), iters - 1)
    before.requires_grad_()
    last = (published_slot_attention(weights, inputs, before, 1) * direction).sum()
    (reached,) = torch.autograd.grad(last, before, retain_graph=True)
    expected = gradients(last + (reached * drawn(attention, noise)).sum(), leaves)
    actual = gradients((slots * direction).sum(), leaves)
    assert actual.keys() == leaves.keys()
    assert gradient_distance(actual, expected) <= 1e-10
    through_all = gradients((full(inputs, noise=noise) * direction).sum(), dict(full.named_parameters()))
    assert (distance(actual["to_key"], through_all["to_key"]) <= 1e-10) == (iters == 1)


@pytest.mark.parametrize("gradient", ["full", "bilevel"])
def test_gradients_reach_initial_slots_that_are_given(gradient: Any) -> None:
    attention, slots = build(gradient=gradient), normal(2, 4, 8, seed=3).requires_grad_()
    attention(normal(2, 9, 8), slots=slots).square().sum().backward()
    assert slots.grad is not None and (slots.grad.abs() > 0).all()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_slot_that_loses_every_input_stays_finite(autocast: Any) -> None:
    inputs, slots = normal(1, 6, 8), torch.stack([normal(8, seed=3), -normal(8, seed=3)])[None]
    for eps, finite in ((1e-8, True), (0.0, False)):
        attention = build(num_slots=2, iters=1, eps=eps)
        with torch.no_grad():  # far apart, and the same for every input
            attention.norm_inputs.weight.zero_()
            attention.to_query.mul_(100)
            attention.to_key.mul_(100)
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                result = attention.float()(inputs.float(), slots=slots.float())
        assert bool(result.isfinite().all()) == finite


def test_a_fresh_module_has_the_original_initial_values() -> None:
    torch.manual_seed(0)
    parameters = dict(SlotAttention(4, 64, input_dim=32).named_parameters())
    bounds = {  # glorot: sqrt(6 / (fan_in + fan_out)), of the GRU as one kernel for its three gates
        "slots_mu": 6 / (1 + 64),
        "slots_log_sigma": 6 / (1 + 64),
        "to_query": 6 / (64 + 64),
        "to_key": 6 / (32 + 64),
        "to_value": 6 / (32 + 64),
        "gru.weight_ih": 6 / (64 + 3 * 64),
        "mlp.1.weight": 6 / (64 + 128),
        "mlp.3.weight": 6 / (128 + 64),
    }
    for name, square in bounds.items():
        largest = parameters[name].abs().max().item()
        assert 0.9 * square**0.5 < largest <= square**0.5, name
    recurrent = parameters["gru.weight_hh"]
    assert distance(recurrent.T @ recurrent, torch.eye(64)) <= 1e-5
    biases = [name for name in parameters if "bias" in name]
    assert len(biases) == 7 and all(parameters[name].count_nonzero() == 0 for name in biases)


@pytest.mark.parametrize("initial", ["shared", "per_slot"])
def test_initial_sigma_is_the_spread_of_fresh_initial_slots(initial: Any) -> None:
    torch.manual_seed(0)
    attention = SlotAttention(4, 16, initial=initial, initial_sigma=0.25)
    slots = attention.initial_slots(2000, 4, normal(2000, 4, 16).float())
    assert distance(slots.std(dim=0), torch.full((4, 16), 0.25)) <= 0.1
    assert distance(slots.mean(dim=0), attention.slots_mu.expand(4, -1)) <= 0.1


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_an_initial_sigma_that_is_not_positive_is_named(sigma: float) -> None:
    with pytest.raises(ValueError, match=r"^initial_sigma: "):
        SlotAttention(4, 8, initial_sigma=sigma)


@pytest.mark.parametrize("name", ["initial", "gradient", "update", "competition"])
def test_a_choice_that_there_is_not_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: 'shard' is none of [a-z_]+, [a-z_]+"):
        MultiHeadSlotAttention(4, 8, **{name: "shard"})


@pytest.mark.parametrize("name", ["eps", "norm_eps"])
@pytest.mark.parametrize("value", [-1e-8, float("nan")])
def test_an_epsilon_that_is_negative_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {value} is negative"):
        SlotAttention(4, 8, **{name: value})


def test_no_images_give_no_slots() -> None:
    assert build()(normal(0, 9, 8)).shape == (0, 4, 8)


@pytest.mark.parametrize("name", ["num_slots", "dim", "iters", "hidden_dim", "input_dim"])
@pytest.mark.parametrize("size", [0, -3])
def test_a_size_that_is_not_positive_is_named(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {size} is not positive"):
        SlotAttention(**{"num_slots": 4, "dim": 8, name: size})


@pytest.mark.parametrize(
    ("name", "options", "arguments"),
    [
        ("inputs", {}, {"inputs": normal(2, 9, 7)}),
        ("inputs", {}, {"inputs": normal(9, 8)}),
        ("inputs", {"input_dim": 5}, {}),
        ("num_slots", {}, {"num_slots": 0}),
        ("num_slots", {}, {"num_slots": -1}),
        ("num_slots", {"initial": "per_slot"}, {"num_slots": 5}),
        ("noise", {}, {"noise": normal(2, 5, 8)}),
        ("noise", {}, {"noise": normal(1, 4, 8)}),
        ("noise", {}, {"noise": normal(4, 8)}),
        ("noise", {}, {"noise": normal(2, 4, 8), "num_slots": 3}),
        ("slots", {}, {"slots": normal(2, 4, 7)}),
        ("slots", {}, {"slots": normal(1, 4, 8)}),
        ("slots", {}, {"slots": normal(4, 8)}),
        ("slots", {}, {"slots": normal(2, 0, 8)}),
        ("slots", {}, {"slots": normal(2, 4, 8), "num_slots": 3}),
        ("noise", {}, {"slots": normal(2, 4, 8), "noise": normal(2, 4, 8)}),
    ],
)
def test_an_argument_that_does_not_fit_is_named(name: str, options: Any, arguments: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        build(**options)(**{"inputs": normal(2, 9, 8)} | arguments)
