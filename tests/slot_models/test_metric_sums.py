"""Sums of metrics over batches and ranks give the means over all images."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentations import scene

from slot_models.metrics import (
    MetricSums,
    segmentation_metrics,
)

NUMBERS = st.one_of(st.floats(-1e6, 1e6), st.just(float("nan")))


@given(
    rows=st.lists(st.tuples(NUMBERS, NUMBERS, st.booleans()), max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_means_over_any_split_into_batches_and_ranks_are_those_of_all_images(
    rows: list[tuple[float, float, bool]], cuts: list[int]
) -> None:
    values = torch.tensor([row[:2] for row in rows], dtype=torch.float64).reshape(-1, 2)
    counted = torch.tensor([row[2] for row in rows], dtype=torch.bool)
    expected = {}
    for name, column in zip(("a", "b"), values.unbind(1), strict=True):
        known = [value for value, counts in zip(column.tolist(), counted, strict=True) if counts and value == value]
        if known:
            expected[name] = pytest.approx(sum(known) / len(known), rel=1e-9, abs=1e-6)

    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    ranks = [MetricSums.zeros(("a", "b"))]
    for start, end in pairwise(edges):
        part = {"a": values[start:end, 0], "b": values[start:end, 1]}
        ranks.append(MetricSums.zeros(("a", "b")) + MetricSums.from_batch(part, counted[start:end]))
    flat = torch.stack([sums.tensor() for sums in ranks]).sum(dim=0)  # what one reduction over ranks does
    assert flat.dtype == torch.float64 and flat.shape == (4,)
    assert MetricSums.from_tensor(("a", "b"), flat).means() == expected


def test_sums_of_half_precision_values_are_taken_in_double_precision() -> None:
    ones = torch.ones(3001, dtype=torch.bfloat16)
    assert MetricSums.from_batch({"a": ones}).means() == {"a": 1.0}
    assert MetricSums.from_batch({"a": ones}).count.tolist() == [3001.0]


def test_no_metrics_and_no_counted_images_have_no_means() -> None:
    assert MetricSums.from_batch({}).means() == {}
    nobody = MetricSums.from_batch({"a": torch.ones(2)}, torch.zeros(2, dtype=torch.bool))
    assert nobody.means() == {} and nobody.count.tolist() == [0.0]


def test_the_sums_of_segmentations_leave_padding_and_images_without_objects_out() -> None:
    true, masks = scene(5, 3, 4, 6, 6, 0.8, batch=6)
    true[2] = 0
    counted = torch.tensor([True, True, True, False, True, False])
    metrics = segmentation_metrics(true, masks)
    means = MetricSums.from_batch(metrics, counted).means()
    for name in ("fg_ari", "mbo", "miou", "corloc"):
        assert means[name] == pytest.approx(float(metrics[name][[0, 1, 4]].mean()), abs=1e-12), name
    assert means["ari"] == pytest.approx(float(metrics["ari"][[0, 1, 2, 4]].mean()), abs=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MetricSums.zeros(("a",)) + MetricSums.zeros(("b",)), r"^names: \('a',\) differ from \('b',\)"),
        (lambda: MetricSums.from_tensor(("a",), torch.zeros(3)), r"^tensor: shape \(3,\) is not \[2\]"),
        (lambda: MetricSums.from_batch({"a": torch.zeros(2, 2)}), r"^a: shape \(2, 2\) is not \[B\]"),
        (lambda: MetricSums.from_batch({"a": torch.zeros(2)}, torch.ones(3).bool()), r"^a: shape \(2,\) is not \[3\]"),
        (lambda: MetricSums.from_batch({"a": torch.zeros(2)}, torch.ones(2, 1).bool()), r"^counted: shape \(2, 1\)"),
    ],
)
def test_sums_that_do_not_fit_are_named(make: Callable[[], MetricSums], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
