"""MetaSlot's two passes, its codebook, and the loss that pushes slots apart."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_oracles import distance, gradient_distance, gradients, published_slot_attention, randomise
from torch import Tensor

from slot_models import Codebook, MetaSlotAttention, MultiHeadSlotAttention, OrthoSlotWrapper, SlotAttention
from slot_models.ortho import orthogonality


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(codebook_size: int = 3, gradient: Any = "bilevel", **options: Any) -> MetaSlotAttention:
    torch.manual_seed(1)
    meta = MetaSlotAttention(
        SlotAttention(5, 6, 3, hidden_dim=7, gradient=gradient), codebook_size=codebook_size, **options
    ).double()
    randomise(meta)
    meta.codebook.codes.mul_(3)
    return meta


def firsts(indices: Tensor) -> Tensor:
    """bool [B, K]: no earlier slot has this index."""
    rows = [[code not in row[:slot] for slot, code in enumerate(row)] for row in indices.tolist()]
    return torch.tensor(rows)


def test_two_passes_are_those_of_the_paper() -> None:
    meta, inputs, noise = build(), normal(4, 9, 6).requires_grad_(), normal(4, 5, 6, seed=3)
    weights = dict(meta.slot_attention.named_parameters())
    initial = meta.slot_attention.initial_slots(4, 5, noise)
    with torch.no_grad():
        first = published_slot_attention(weights, inputs, initial, 3)
        indices = torch.cdist(first, meta.codebook.codes.double()).argmin(dim=2)
        keep = firsts(indices)
        before = published_slot_attention(weights, inputs, meta.codebook.codes[indices], 2, slot_mask=keep)
    assert not keep.all() and keep.any(dim=1).all()
    start = (before + initial - initial.detach()) * keep[..., None]
    expected = published_slot_attention(weights, inputs, start, 1, slot_mask=keep)

    found = meta(inputs, noise=noise)
    assert torch.equal(found.keep, keep)
    assert distance(found.slots, expected) <= 1e-10
    direction, leaves = normal(4, 5, 6, seed=4), weights | {"inputs": inputs}
    mine, theirs = (gradients((slots * direction).sum(), leaves) for slots in (found.slots, expected))
    assert mine.keys() == leaves.keys()
    assert gradient_distance(mine, theirs) <= 1e-10


@pytest.mark.parametrize("second_pass", [True, False])
def test_nothing_is_pruned_until_it_is_asked_for(second_pass: bool) -> None:
    meta = build(codebook_size=1, second_pass=True)
    assert meta(normal(2, 9, 6), prune=False).keep.all()
    assert (meta(normal(2, 9, 6)).keep.sum(dim=1) == 1).all()


def test_noise_weakens_to_nothing_over_each_pass() -> None:
    meta, inputs = build(noise=0.5), normal(2, 9, 6)
    assert meta.noise_levels.tolist() == [0.5, 0.25, 0.0]
    noise = torch.zeros(2, 2, 3, 9, 6).double()
    noise[:, :, 2] = 1e9  # the last iteration's weight is zero
    assert distance(meta(inputs, input_noise=noise).slots, meta(inputs).slots) <= 1e-12
    noise = normal(2, 2, 3, 9, 6, seed=7)
    seen = []
    hook = meta.slot_attention.register_forward_hook(
        lambda module, arguments, options, output: seen.append(options["input_noise"]), with_kwargs=True
    )
    meta(inputs, input_noise=noise)
    hook.remove()
    levels = torch.tensor([0.5, 0.25, 0.0]).double()[:, None, None]
    assert distance(torch.stack(seen, dim=1), noise * levels) <= 1e-12
    # What an iteration sees is the noisy input: as much as one more input layer that adds it
    attention, slots = meta.slot_attention, normal(2, 5, 6, seed=3)
    once = SlotAttention(5, 6, 1, hidden_dim=7).double()
    once.load_state_dict(attention.state_dict())
    plain = once(inputs, slots=slots)
    assert distance(once(inputs, slots=slots, input_noise=noise[:, 0, :1]), plain) > 1e-3


@pytest.mark.parametrize("second_pass", [True, False])
def test_a_forward_changes_no_state(second_pass: bool) -> None:
    meta = build(second_pass=second_pass).train()
    before = {name: tensor.clone() for name, tensor in meta.state_dict().items()}
    meta(normal(4, 9, 6)).slots.sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in meta.state_dict().items())


@pytest.mark.parametrize("second_pass", [True, False])
@given(cuts=st.sets(st.integers(1, 11), max_size=5), padding=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_tallies_of_any_split_of_a_batch_add_up(second_pass: bool, cuts: set[int], padding: int) -> None:
    meta, inputs, noise = build(second_pass=second_pass), normal(12, 9, 6), normal(12, 5, 6, seed=3)
    whole = meta(inputs, noise=noise)
    counts, sums = torch.zeros_like(whole.counts), torch.zeros_like(whole.sums)
    edges = [0, *sorted(cuts), 12]
    for start, stop in itertools.pairwise(edges):
        rows = [*range(start, stop), *[start] * padding]  # a repeated sample of no weight
        weight = torch.tensor([1.0] * (stop - start) + [0.0] * padding)
        part = meta(inputs[rows], noise=noise[rows], weight=weight)
        counts, sums = counts + part.counts, sums + part.sums
    assert distance(counts, whole.counts) <= 1e-12 and distance(sums, whole.sums) <= 1e-12
    assert whole.counts.sum() == (whole.keep.sum() if second_pass else 60)


def test_every_parameter_gets_a_gradient() -> None:
    for meta in (build(), build(gradient="full"), build(second_pass=False)):
        found = meta(normal(8, 9, 6), noise=normal(8, 5, 6, seed=3))
        (found.slots.square().sum() + found.commitment.sum()).backward()
        assert all(p.grad is not None and p.grad.count_nonzero() > 0 for p in meta.parameters())


def test_it_goes_over_heads_too() -> None:
    torch.manual_seed(0)
    found = MetaSlotAttention(MultiHeadSlotAttention(5, 6, 2, 4, competition="joint"))(torch.randn(2, 9, 6))
    assert found.slots.shape == (2, 5, 6) and found.attention.shape == (2, 5, 9)
    assert (found.slots[~found.keep] == 0).all() and (found.attention[~found.keep] == 0).all()


def test_commitment_is_the_mean_squared_distance_to_the_codes() -> None:
    meta = build(codebook_size=4)
    found = meta(normal(3, 9, 6), noise=normal(3, 5, 6, seed=3))
    for slots, keep, commitment in zip(found.slots, found.keep, found.commitment, strict=True):
        squares = torch.cdist(slots[keep], meta.codebook.codes.double()).square().min(dim=1).values
        assert distance(commitment, squares.mean() / 6) <= 1e-10


def test_half_precision_changes_no_code_no_merging_and_no_loss() -> None:
    codebook, slots = Codebook(256, 16), normal(64, 7, 16).float()
    nearest = torch.cdist(slots.double(), codebook.codes.double()).argmin(dim=2)
    merging = build(codebook_size=2, second_pass=False).float()
    inputs = normal(2, 1, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook.nearest(slots), nearest)
        found = merging(inputs)
        assert found.slots.dtype == found.attention.dtype == torch.float32
        loss = orthogonality(slots)
    assert loss.dtype == torch.float32 and distance(loss, orthogonality(slots)) <= 1e-6


def test_codes_settle_on_the_clusters_of_the_slots() -> None:
    """Eight bunches far apart, one step after another: each ends up with a code at its mean, and the codes that no
    bunch needs do not disturb them."""
    codebook, rng = Codebook(32, 4), np.random.default_rng(0)
    bunches = torch.from_numpy(rng.normal(size=(8, 4)) * 10)
    for _ in range(300):
        which = torch.from_numpy(rng.integers(8, size=(64, 5)))
        slots = bunches[which] + 0.01 * torch.from_numpy(rng.normal(size=(64, 5, 4)))
        codebook.update(*codebook.tally(slots, torch.ones(64, 5, dtype=torch.bool)))
    nearest = torch.cdist(bunches, codebook.codes.double()).min(dim=1).values
    assert nearest.max() < 0.02
    assert codebook.codes.isfinite().all() and codebook.counts.min() >= 0


def test_a_code_in_use_is_the_running_mean_of_its_slots() -> None:
    codebook = Codebook(2, 1, decay=0.8)
    codebook.codes.copy_(torch.tensor([[0.0], [10.0]]))
    codebook.counts.copy_(torch.tensor([4.0, 2.0]))
    slots = torch.tensor([[[1.0], [2.0], [3.0], [13.0]]])
    counts, sums = codebook.tally(slots, torch.tensor([[True, True, False, True]]))
    assert counts.tolist() == [2, 1] and sums.tolist() == [[3], [13]]
    codebook.update(counts, sums)
    assert distance(codebook.counts, torch.tensor([0.8 * 4 + 0.2 * 2, 0.8 * 2 + 0.2])) <= 1e-6
    expected = [(0.8 * 4 * 0 + 0.2 * 3) / 3.6, (0.8 * 2 * 10 + 0.2 * 13) / 1.8]
    assert distance(codebook.codes, torch.tensor(expected)[:, None]) <= 1e-6


def test_nothing_moves_where_no_slot_was_seen() -> None:
    codebook = Codebook(5, 3)
    before = codebook.codes.clone()
    codebook.update(torch.zeros(5).double(), torch.zeros(5, 3).double())
    assert torch.equal(codebook.codes, before)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_a_decay_that_is_none_is_named(decay: float) -> None:
    with pytest.raises(ValueError, match=r"^decay: .* is not in \(0, 1\)"):
        Codebook(4, 3, decay=decay)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"^noise: -1 is negative"):
        build(noise=-1)
    with pytest.raises(ValueError, match=r"^input_noise: shape "):
        build()(normal(2, 9, 6), input_noise=normal(2, 3, 9, 6))
    with pytest.raises(ValueError, match=r"^weight: shape \(3,\) is not \[2\]"):
        build()(normal(2, 9, 6), weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"^codebook_size: 0 is not positive"):
        build(codebook_size=0)


@given(batch=st.integers(1, 3), num_slots=st.integers(1, 6), dim=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_orthogonality_is_the_mean_squared_product_of_different_centred_slots(
    batch: int, num_slots: int, dim: int, seed: int
) -> None:
    slots = normal(batch, num_slots, dim, seed=seed)
    for image, loss in zip(slots.numpy(), orthogonality(slots), strict=True):
        centred = image - image.mean(axis=0)
        pairs = [(centred[i] @ centred[j]) ** 2 for i in range(num_slots) for j in range(num_slots) if i != j]
        assert abs(loss.item() - (np.mean(pairs) if pairs else 0)) <= 1e-12 * (1 + abs(loss.item()))


def test_the_wrapper_passes_on_what_it_wraps() -> None:
    meta, inputs = build(), normal(2, 9, 6)
    slots, loss = OrthoSlotWrapper(meta.slot_attention)(inputs, 4)
    assert slots.shape == (2, 4, 6) and torch.equal(loss, orthogonality(slots))
    *found, loss = OrthoSlotWrapper(meta)(inputs)
    assert len(found) == 6 and torch.equal(found[0], meta(inputs).slots) and torch.equal(loss, orthogonality(found[0]))
