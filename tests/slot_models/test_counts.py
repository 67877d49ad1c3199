"""Counts of kept slots and objects against numpy and scipy on the lists themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slot_models import SlotCounts, count_confusion

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=50)


def confusion(pairs: list[tuple[int, int]]) -> torch.Tensor:
    kept, objects = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return count_confusion(kept, objects, 6, 5)


@given(pairs=PAIRS, background_slots=st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_the_metrics_equal_those_of_the_lists(pairs: list[tuple[int, int]], background_slots: int) -> None:
    counts = SlotCounts(confusion(pairs), background_slots)
    kept, objects = np.array(pairs, dtype=float).T
    difference = kept - background_slots - objects
    assert counts.images == len(pairs)
    assert counts.accuracy == pytest.approx((difference == 0).mean(), abs=1e-12)
    assert counts.mean_absolute_error == pytest.approx(np.abs(difference).mean(), abs=1e-12)
    assert counts.kept_mean == pytest.approx(kept.mean(), abs=1e-12)
    varies = len(set(kept)) > 1 and len(set(objects)) > 1
    correlation = stats.pearsonr(kept, objects).statistic if varies else 0.0
    assert counts.correlation == pytest.approx(correlation, abs=1e-9)


@given(pairs=PAIRS)
@settings(max_examples=60, deadline=None)
def test_no_constant_answer_beats_the_best_constant(pairs: list[tuple[int, int]]) -> None:
    objects = np.array(pairs)[:, 1]
    best = SlotCounts(confusion(pairs)).best_constant_error
    answers = np.linspace(-1, 7, 81)  # tenths of an object too
    assert best == pytest.approx(np.abs(objects[:, None] - answers).mean(axis=0).min(), abs=1e-12)


def test_uniform_counts_of_two_to_four_have_a_best_constant_error_of_two_thirds() -> None:
    assert SlotCounts(confusion([(6, 2), (6, 3), (6, 4)])).best_constant_error == pytest.approx(2 / 3)


@given(pairs=PAIRS, cut=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_a_confusion_is_the_sum_of_its_batches_and_counts_every_pair(pairs: list[tuple[int, int]], cut: int) -> None:
    whole = confusion(pairs)
    assert whole.dtype == torch.float64 and whole.shape == (7, 6)
    assert torch.equal(whole, confusion(pairs[:cut]) + confusion(pairs[cut:]))
    kept, objects = np.array(pairs).T
    expected, _, _ = np.histogram2d(kept, objects, bins=[np.arange(8) - 0.5, np.arange(7) - 0.5])
    np.testing.assert_array_equal(whole.numpy(), expected)


@given(pairs=PAIRS, unknown=st.lists(st.integers(0, 6), max_size=5))
@settings(max_examples=30, deadline=None)
def test_images_with_an_unknown_number_of_objects_are_left_out(
    pairs: list[tuple[int, int]], unknown: list[int]
) -> None:
    assert torch.equal(confusion([(kept, -1) for kept in unknown] + pairs), confusion(pairs))


@pytest.mark.parametrize(("name", "pair"), [("kept", (7, 2)), ("objects", (2, 6))])
def test_a_number_above_its_most_is_named(name: str, pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {max(pair)} is above {max(pair) - 1}"):
        confusion([(1, 1), pair])
