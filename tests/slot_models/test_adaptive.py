"""The gate against torch's own Gumbel softmax and against the law it samples; the mixture without dropped slots."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from slot_oracles import distance, gradient_distance, gradients, randomise
from torch import Tensor
from torch.nn import functional

from slot_models import (
    AdaptiveSlotWrapper,
    MultiHeadSlotAttention,
    PackageGate,
    SlotAttention,
    SlotGate,
    build_autoencoder,
    gumbel_noise,
    keep_differences,
    keep_penalty,
    masked_mixture,
    penalty_weight,
)


def build(dim: int = 6, seed: int = 1, **options: Any) -> SlotGate:
    torch.manual_seed(seed)
    gate = SlotGate(dim, **options).double()
    randomise(gate, seed)
    return gate


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gumbel(*shape: int, seed: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).gumbel(size=shape))


def logits_of(gate: SlotGate, slots: Tensor) -> Tensor:
    """LN(D) -> Linear(D, 4D) -> ReLU -> Linear(4D, 2), from the weights alone."""
    weights = dict(gate.named_parameters())
    normed = functional.layer_norm(slots, slots.shape[-1:], weights["norm.weight"], weights["norm.bias"])
    hidden = normed @ weights["hidden.weight"].T + weights["hidden.bias"]
    return hidden.clamp(min=0) @ weights["logits.weight"].T + weights["logits.bias"]


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 11)])
def test_decisions_and_gradients_equal_torchs_gumbel_softmax(shape: tuple[int, int], temperature: float) -> None:
    gate, slots = build(), normal(*shape, 6).requires_grad_()
    logits = logits_of(gate, slots)
    torch.manual_seed(4)
    noise = -torch.empty_like(logits).exponential_().log()
    torch.manual_seed(4)
    expected = functional.gumbel_softmax(logits, tau=temperature, hard=True)[..., 1]
    ours = gate(slots, noise, temperature)
    assert distance(ours.probability, logits.softmax(-1)[..., 1]) <= 1e-12

    some = expected.detach().round().sum(dim=1) > 0
    assert torch.equal(ours.keep[some].detach(), expected[some].detach().round())
    assert shape != (40, 11) or some.sum() > 20

    leaves, direction = dict(gate.named_parameters()) | {"slots": slots}, normal(*shape, seed=5)
    mine, theirs = (gradients((keep * direction).sum(), leaves) for keep in (ours.keep, expected))
    assert mine.keys() == leaves.keys()
    assert gradient_distance(mine, theirs) <= 1e-10


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_slots_are_kept_as_often_as_the_softmax_of_their_logits_says(temperature: float) -> None:
    gate, slots = build(), 2 * normal(1, 60_000, 6)
    decided = gate(slots, gumbel(1, 60_000, 2), temperature)
    law = logits_of(gate, slots).softmax(-1)[0, :, 1].detach()
    assert law.min() < 0.1 and law.max() > 0.9
    for tenth in law.argsort().chunk(10):  # from the least likely to the likeliest
        expected, variance = law[tenth].sum(), (law[tenth] * (1 - law[tenth])).sum()
        assert abs(decided.keep[0, tenth].sum() - expected) < 4.5 * variance.sqrt()


def test_the_slots_of_an_image_are_decided_independently() -> None:
    gate = build()
    with torch.no_grad():
        gate.logits.weight.zero_()
        gate.logits.bias.copy_(torch.tensor([0.0, 0.4]))
    keep = gate(normal(20_000, 2, 6), gumbel(20_000, 2, 2)).keep
    p = torch.tensor(0.4).sigmoid()
    both = 20_000 * p**2
    assert abs((keep.sum(dim=1) == 2).sum() - both) < 4.5 * (both * (1 - p**2)).sqrt()


@given(
    seed=st.integers(0, 1000),
    dropped=st.floats(0, 1000),
    batch=st.integers(1, 5),
    num_slots=st.integers(1, 6),
    temperature=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    noisy=st.booleans(),
    double=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_where_no_slot_would_be_kept_the_likeliest_one_is(
    seed: int, dropped: float, batch: int, num_slots: int, temperature: float, noisy: bool, double: bool
) -> None:
    gate = build(seed=seed).to(torch.float64 if double else torch.float32)
    slots = normal(batch, num_slots, 6, seed=seed).to(gate.norm.weight)
    noise = gumbel(batch, num_slots, 2, seed=seed).to(slots) if noisy else None
    with torch.no_grad():
        gate.logits.bias.copy_(torch.tensor([dropped, -dropped]))
        logits = gate.logits(gate.hidden(gate.norm(slots)).relu()) + (noise if noisy else 0)
        keep = gate(slots, noise, temperature).keep
    assert set(keep.unique().tolist()) <= {0.0, 1.0} and keep.dtype == slots.dtype
    for kept, image in zip(keep, logits, strict=True):
        margin = image[:, 1] - image[:, 0]
        wanted = (margin > 0).nonzero().flatten().tolist() or [int(margin.argmax())]
        assert kept.nonzero().flatten().tolist() == wanted


def test_without_noise_the_decision_is_the_likelier_one() -> None:
    gate, slots = build(), normal(50, 7, 6)
    decided, likelier = gate(slots), logits_of(gate, slots).argmax(dim=-1)
    some = likelier.sum(dim=1) > 0
    assert some.sum() > 20 and 0 < likelier[some].double().mean() < 1
    assert torch.equal(decided.keep[some], likelier[some].double())
    torch.manual_seed(7)
    assert torch.equal(gate(slots).keep, decided.keep) and torch.equal(gate(slots[3:4]).keep, decided.keep[3:4])


@given(temperature=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_temperature_changes_the_gradient_alone(temperature: float, seed: int) -> None:
    gate, slots, noise = build(seed=seed), normal(4, 5, 6, seed=seed), gumbel(4, 5, 2, seed=seed)
    weights = dict(gate.named_parameters())
    one, other = gate(slots, noise), gate(slots, noise, temperature)
    assert torch.equal(one.keep, other.keep) and torch.equal(one.probability, other.probability)
    # d sigmoid(margin / t) / d margin at the noised logits, in a bias: sum of s (1 - s) / t
    gap = (logits_of(gate, slots) + noise) @ torch.tensor([-1.0, 1.0], dtype=torch.float64)
    soft = (gap / temperature).sigmoid()
    expected = (soft * (1 - soft) / temperature).sum()
    bias = gradients(other.keep.sum(), weights)["logits.bias"]
    assert (bias - torch.stack([-expected, expected])).abs().max() <= 1e-12 / temperature


@given(bias=st.floats(-20, 20))
@settings(max_examples=20, deadline=None)
def test_keep_bias_moves_the_initial_logit_of_keep_over_drop(bias: float) -> None:
    slots, gaps = normal(2, 5, 6), []
    for options in ({"keep_bias": bias}, {}):
        torch.manual_seed(1)
        gaps.append(logits_of(SlotGate(6, **options).double(), slots).diff(dim=-1))
    assert (gaps[0] - gaps[1] - bias).abs().max() <= 1e-5


def test_the_well_known_example_of_the_wrapper() -> None:
    torch.manual_seed(0)
    wrapper = AdaptiveSlotWrapper(SlotAttention(5, 512), temperature=0.5)
    inputs, noise, gate_noise = torch.randn(2, 64, 512), torch.randn(2, 5, 512), torch.randn(2, 5, 2)
    slots, keep = wrapper(inputs, noise=noise, gate_noise=gate_noise)
    assert slots.shape == (2, 5, 512) and keep.shape == (2, 5)
    assert torch.equal(slots, wrapper.slot_attn(inputs, noise=noise))
    assert torch.equal(keep, wrapper.gate(slots, gate_noise).keep)
    (steep,) = torch.autograd.grad(keep.sum(), wrapper.gate.logits.bias, retain_graph=True)
    (expected,) = torch.autograd.grad(wrapper.gate(slots, gate_noise, 0.5).keep.sum(), wrapper.gate.logits.bias)
    assert torch.equal(steep, expected)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_named(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"^temperature: "):
        build()(normal(2, 4, 6), temperature=temperature)


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (2, 4, 1), (1, 4, 2), (2, 5, 2)])
def test_gate_noise_of_another_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^noise: "):
        build()(normal(2, 4, 6), gumbel(*shape))


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Mask logits [B, K, H, W] and keep [B, K] with one slot at least."""
    batch, num_slots, height, width = (draw(st.integers(1, most)) for most in (3, 6, 4, 4))
    row = st.lists(st.booleans(), min_size=num_slots, max_size=num_slots).filter(any)
    keep = draw(st.lists(row, min_size=batch, max_size=batch))
    spread, seed = draw(st.floats(0, 6)), draw(st.integers(0, 1000))
    return spread * normal(batch, num_slots, height, width, seed=seed), torch.tensor(keep, dtype=torch.float64)


@given(mixture=mixtures())
@settings(max_examples=60, deadline=None)
def test_a_mixture_is_the_softmax_over_the_kept_slots(mixture: tuple[Tensor, Tensor]) -> None:
    logits, keep = mixture
    masks = masked_mixture(logits, keep)
    assert masks.shape == logits.shape and (masks[keep == 0] == 0).all()
    for image, kept, mask in zip(logits, keep.bool(), masks, strict=True):
        share = image.softmax(dim=0)[kept].sum(dim=0)  # of the kept slots before the gate [H, W]
        shrunk = share / (share + 1e-5)  # by the published epsilon
        assert distance(mask[kept], image[kept].softmax(dim=0) * shrunk) <= 1e-12
        assert distance(mask.sum(dim=0), shrunk) <= 1e-12


def test_the_gradient_of_a_mixture_in_keep_is_that_of_the_published_formula() -> None:
    logits, keep = normal(2, 4, 3, 3), torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 0]]).double().requires_grad_()
    assert torch.autograd.gradcheck(masked_mixture, (logits.requires_grad_(), keep))
    # A slot enters with the share alpha: d/dZ_k of (sum Z a y) / (sum Z a + eps) = a_k (y_k - mean) / (sum + eps)
    pictures = normal(2, 4, 3, 3, seed=5)
    masks = masked_mixture(logits, keep)
    mean = (masks * pictures).sum(dim=1, keepdim=True)
    alpha = logits.softmax(dim=1)
    total = (alpha * keep[:, :, None, None]).sum(dim=1, keepdim=True) + 1e-5
    expected = (alpha * (pictures - mean) / total).sum(dim=(2, 3))
    (actual,) = torch.autograd.grad(mean.sum(), keep)
    assert distance(actual, expected) <= 1e-12


def differences(images: Tensor, pictures: Tensor, logits: Tensor, keep: Tensor) -> Tensor:
    """The error with a slot less the error without it, one slot at a time. [B, K]"""
    columns = []
    for slot in range(keep.shape[1]):
        errors = []
        for value in (1.0, 0.0):
            decided = keep.clone()
            decided[:, slot] = value
            mixed = (masked_mixture(logits, decided)[:, :, None] * pictures).sum(dim=1)
            errors.append((mixed - images).square().mean(dim=(1, 2, 3)))
        columns.append(errors[0] - errors[1])
    return torch.stack(columns, dim=1)


@given(mixture=mixtures())
@settings(max_examples=60, deadline=None)
def test_the_difference_of_a_slot_is_the_error_with_it_less_the_error_without_it(
    mixture: tuple[Tensor, Tensor],
) -> None:
    logits, keep = mixture
    batch, num_slots, height, width = logits.shape
    pictures, images = normal(batch, num_slots, 3, height, width, seed=6), normal(batch, 3, height, width, seed=7)
    expected = differences(images, pictures, logits, keep)
    assert (keep_differences(images, pictures, logits, keep) - expected).abs().max() <= 1e-9


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0, 100.0])
def test_differences_are_precise_in_float32_for_flat_and_for_sharp_masks(spread: float) -> None:
    # A share that is taken away leaves its rounding, which the mixture's epsilon of 1e-5 magnifies.
    logits, pictures = spread * normal(8, 5, 21, 21), normal(8, 5, 3, 21, 21, seed=6).clamp(-1, 1)
    images, keep = normal(8, 3, 21, 21, seed=7).clamp(-1, 1), (normal(8, 5, seed=8) > 0.3).double()
    keep[:, 0] = 1
    single = keep_differences(*(part.float() for part in (images, pictures, logits, keep)))
    assert single.dtype == torch.float32
    assert (single - differences(images, pictures, logits, keep)).abs().max() <= 2e-4


@pytest.mark.parametrize("exploration", [0.01, 0.05, 0.4])
def test_exploration_bounds_the_probability_of_both_decisions(exploration: float) -> None:
    gate = SlotGate(8, exploration=exploration).double()
    with torch.no_grad():
        gate.logits.weight.mul_(1e4)  # decisions as extreme as they come
    with torch.no_grad():
        probability = gate(torch.randn(64, 5, 8, generator=torch.Generator().manual_seed(0)).double()).probability
    assert probability.min() == pytest.approx(exploration, rel=1e-3)
    assert probability.max() == pytest.approx(1 - exploration, rel=1e-3)


def test_exploration_has_to_leave_room_for_a_decision() -> None:
    with pytest.raises(ValueError, match=r"exploration: 0.5 is not in \[0, 0.5\)"):
        SlotGate(8, exploration=0.5)


@pytest.mark.parametrize("keep_bias", [-1.0, 0.0, 2.0])
def test_the_random_stage_keeps_slots_with_a_fresh_gates_probability_whatever_they_hold(keep_bias: float) -> None:
    gate = build(keep_bias=keep_bias)
    slots = torch.randn(4000, 5, 6, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    uniform = torch.rand(4000, 5, 2, generator=torch.Generator().manual_seed(1)).double()
    keep = gate(slots, -uniform.log().neg().log(), stage="random").keep
    expected = 1 / (1 + np.exp(-keep_bias))
    none = (1 - expected) ** 5  # one is kept then
    assert keep.mean().item() == pytest.approx(expected + none / 5, abs=4 * (expected * (1 - expected) / 20000) ** 0.5)
    keep.square().sum().backward()
    assert slots.grad is not None
    assert slots.grad.count_nonzero() == 0
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in gate.parameters())


@pytest.mark.parametrize("attention", [SlotAttention(5, 512), MultiHeadSlotAttention(5, 512)], ids=["one", "heads"])
def test_the_wrapper_goes_over_both_attentions(attention: SlotAttention | MultiHeadSlotAttention) -> None:
    torch.manual_seed(0)
    wrapper, inputs = AdaptiveSlotWrapper(attention), torch.randn(2, 64, 512)
    slots, keep = wrapper(inputs)
    assert slots.shape == (2, 5, 512) and keep.shape == (2, 5)
    assert set(keep.unique().tolist()) <= {0.0, 1.0} and (keep.sum(dim=1) >= 1).all()
    again = wrapper(inputs)
    assert torch.equal(again[0], slots) and torch.equal(again[1], keep)
    few, few_keep = wrapper(inputs, 3)
    assert few.shape == (2, 3, 512) and few_keep.shape == (2, 3)


def test_a_schedule_hands_in_the_temperature_of_a_call() -> None:
    wrapper = AdaptiveSlotWrapper(SlotAttention(4, 6), temperature=1.0).double()
    inputs, noise = normal(2, 9, 6), gumbel(2, 4, 2)
    weight = wrapper.gate.logits.weight
    for temperature in (0.5, 3.0):
        (actual,) = torch.autograd.grad(wrapper(inputs, gate_noise=noise, temperature=temperature)[1].sum(), weight)
        other = AdaptiveSlotWrapper(wrapper.slot_attn, temperature, wrapper.gate)
        (expected,) = torch.autograd.grad(other(inputs, gate_noise=noise)[1].sum(), weight)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("temperature", [0.0, -0.5, float("nan")])
def test_a_wrappers_temperature_that_is_not_positive_is_named(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"^temperature: "):
        AdaptiveSlotWrapper(SlotAttention(4, 6), temperature)
    with pytest.raises(ValueError, match=r"^temperature: "):
        AdaptiveSlotWrapper(SlotAttention(4, 6))(torch.zeros(1, 3, 6), temperature=temperature)


@pytest.mark.parametrize("gate", [SlotGate(6), PackageGate(6)], ids=["paper's", "package's"])
def test_gate_noise_that_is_not_finite_is_named(gate: SlotGate | PackageGate) -> None:
    noise = gumbel(2, 4, 2)
    noise[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match=r"^gate_noise: it holds NaN"):
        AdaptiveSlotWrapper(SlotAttention(4, 6), gate=gate)(torch.zeros(2, 3, 6), gate_noise=noise)


@pytest.mark.parametrize("gate", [SlotGate, PackageGate])
def test_slots_that_do_not_fit_and_no_slots_are_named(gate: type[SlotGate] | type[PackageGate]) -> None:
    with pytest.raises(ValueError, match=r"^slots: shape \(2, 4, 5\) is not \[B, K, 6\]"):
        gate(6)(torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"^slots: shape \(2, 0, 6\) has no slots"):
        gate(6)(torch.zeros(2, 0, 6))
    with pytest.raises(ValueError, match=r"^dim: 0 is not positive"):
        gate(0)


def test_a_stage_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match=r"^stage: 'opne' is none of open, random, deciding"):
        build()(normal(2, 4, 6), stage="opne")  # type: ignore[arg-type]


def test_gumbel_noise_is_standard_gumbel_and_its_generators_alone() -> None:
    state = torch.get_rng_state()
    noise = gumbel_noise(200, 50, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(noise, gumbel_noise(200, 50, 2, generator=torch.Generator().manual_seed(1)))
    assert noise.shape == (200, 50, 2) and noise.isfinite().all()
    assert stats.kstest(noise.numpy().ravel(), "gumbel_r").pvalue > 1e-3


def test_the_published_weight_of_clevr10s_penalty() -> None:
    assert penalty_weight(10, 3, 128, 128) == pytest.approx(2.03e-4, abs=5e-7)


@pytest.mark.parametrize("size", [12, 16])
@pytest.mark.parametrize("batch", [2, 5])
def test_the_loss_points_where_the_papers_sum_form_does(batch: int, size: int) -> None:
    """The paper: error summed over an image's values, lambda x mean of keep over batch and slots, batch mean. Ours: the
    error's mean and lambda / (C H W), per image."""
    torch.manual_seed(0)
    model = build_autoencoder(image_size=size, num_slots=4, slot_dim=8, gate={}).double()
    randomise(model)
    images = normal(batch, 3, size, size)
    output = model(images, normal(batch, 4, 8, seed=3), gumbel(batch, 4, 2))
    squares = (output.reconstruction - images).square()
    published = squares.sum(dim=(1, 2, 3)).mean() + 10 * output.keep.mean()
    per_image = squares.mean(dim=(1, 2, 3)) + penalty_weight(10, 3, size, size) * keep_penalty(output.keep)
    leaves = dict(model.named_parameters())
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(published, [*leaves.values()], retain_graph=True)])
    ours = torch.cat([g.flatten() for g in torch.autograd.grad(per_image.mean(), [*leaves.values()])])
    assert distance(ours * 3 * size * size, theirs) <= 1e-12
    assert torch.cosine_similarity(ours, theirs, dim=0) == pytest.approx(1, abs=1e-12)


def test_the_packages_gate_is_not_the_papers() -> None:
    """A low temperature changes how often the package's gate keeps a slot, and all slots may go."""
    gate = PackageGate(6).double()
    with torch.no_grad():
        gate.logits.weight.copy_(torch.stack([torch.zeros(6), torch.ones(6)]))
    slots = torch.full((1, 40_000, 6), 1 / 6, dtype=torch.float64)  # a logit gap of one
    for temperature, expected in ((1.0, 1.0), (0.1, 10.0)):
        kept = gate(slots, gumbel(1, 40_000, 2), temperature).keep.mean().item()
        assert kept == pytest.approx(1 / (1 + np.exp(-expected)), abs=0.01)
    assert gate(-slots).keep.sum() == 0
    # Its gradient at temperature 0.1: s (1 - s) / t at a gap of 10, 4.5e-4
    (gradient,) = torch.autograd.grad(gate(slots[:, :1], temperature=0.1).keep.sum(), gate.logits.weight)
    assert gradient[1].sum().item() == pytest.approx(4.5e-4, rel=0.02)
