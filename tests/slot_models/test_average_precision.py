"""Average precision of sets against its description, followed one prediction at a time."""

import math
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slot_models.average_precision import THRESHOLDS, SetResults, average_precision
from slot_models.set_prediction import clevr_targets

SIZES = {
    "seed": st.integers(0, 2**32),
    "images": st.integers(1, 5),
    "slots": st.integers(1, 6),
    "rows": st.integers(1, 6),
    "noise": st.sampled_from([0.0, 0.02, 0.1, 0.3]),
    "wrong": st.sampled_from([0.0, 0.2, 0.6]),
}


def described(predictions: np.ndarray, targets: np.ndarray, threshold: float) -> float:
    """The area under the envelope, from a ranked list that is walked down prediction by prediction."""

    def factors(row: np.ndarray) -> tuple[int, ...]:
        return tuple(int(np.argmax(row[start:end])) for start, end in ((3, 5), (5, 7), (7, 10), (10, 18)))

    ranked = [
        (-prediction[18], image, slot) for image, one in enumerate(predictions) for slot, prediction in enumerate(one)
    ]
    detected: set[tuple[int, int]] = set()
    precision, recall = [], []
    objects = int(targets[:, :, 18].sum())
    for count, (_, image, slot) in enumerate(sorted(ranked), start=1):  # equal ones: by image, then by slot
        prediction, nearest, least = predictions[image, slot], None, math.inf
        for row, target in enumerate(targets[image]):
            if target[18] and factors(target) == factors(prediction):
                distance = math.dist(target[:3] * 6, prediction[:3] * 6)
                if distance < least:
                    nearest, least = row, distance
        if nearest is not None and least < threshold and (image, nearest) not in detected:
            detected.add((image, nearest))
        precision.append(len(detected) / count)
        recall.append(len(detected) / objects)
    area, before = 0.0, 0.0
    for place, value in enumerate(recall):
        area += (value - before) * max(precision[place:])
        before = value
    return area


def random_sets(
    seed: int, images: int, slots: int, rows: int, noise: float, wrong: float, ties: bool = False
) -> tuple[Tensor, Tensor]:
    """Targets with equal objects among them, and predictions that are noisy copies of some, some with a wrong factor.

    At least one row is an object. Without ``ties`` no two confidences are equal.
    """
    random = np.random.default_rng(seed)
    shape = (images, rows)
    classes = {"size": 2, "material": 1, "shape": 1, "colour": 2}  # few, so that several objects have the same
    real = random.random(shape) < 0.7
    real[0, 0] = True
    factors = {name: torch.from_numpy(random.integers(0, count, shape)) for name, count in classes.items()}
    coordinates = random.uniform(-3, 3, (*shape, 3))
    twins = random.random(images) < 0.3
    coordinates[twins, -1] = coordinates[twins, 0]  # two objects in the same place
    targets = clevr_targets(torch.from_numpy(coordinates), **factors, real=torch.from_numpy(real), rows=rows)
    copied = torch.from_numpy(random.integers(0, rows, (images, slots)))
    predictions = targets.gather(1, copied[..., None].expand(-1, -1, 19)).clone()
    predictions += torch.from_numpy(random.uniform(-noise, noise, predictions.shape))
    flipped = torch.from_numpy(random.random((images, slots)) < wrong)
    predictions[..., 3:5] = torch.where(flipped[..., None], predictions[..., 3:5].flip(-1), predictions[..., 3:5])
    confidence = random.integers(0, 3, (images, slots)) / 2 if ties else random.permutation(images * slots) / 100
    predictions[..., 18] = torch.from_numpy(confidence.reshape(images, slots))
    return predictions, targets


@given(**SIZES, ties=st.booleans())
@settings(max_examples=120, deadline=None)
def test_the_area_is_that_of_the_description(**sizes: Any) -> None:
    predictions, targets = random_sets(**sizes)
    values = average_precision(predictions, targets, (*THRESHOLDS, 7.0))
    assert values.dtype == torch.float64 and values.shape == (6,)
    expected = [described(predictions.numpy(), targets.numpy(), threshold) for threshold in (*THRESHOLDS, 7.0)]
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-12)


def row(x: float, confidence: float, colour: int = 0, is_real: bool = True) -> Tensor:
    """A metal cube at (x, 0, 0) in the scene."""
    first = torch.tensor([[0]])
    made = clevr_targets(torch.tensor([[[x, 0.0, 0.0]]]), first, first, first, first + colour, rows=1)[0, 0].double()
    made[18] = confidence
    return made if is_real else torch.zeros_like(made)


def test_an_example_worked_out_by_hand() -> None:
    targets = torch.stack([row(0, 1), row(2, 1, colour=3), row(0, 1, is_real=False)])[None]
    # right at distance 0, wrong colour, right at distance 0.3
    predictions = torch.stack([row(2.3, 0.7, colour=3), row(0, 0.9), row(0, 0.8, colour=5)])[None]
    # hits down the list 1, 0, 1 of two objects: precision 1, 1/2, 2/3; recall 1/2, 1/2, 1
    below_far, below_near = average_precision(predictions, targets, [0.31, 0.29]).tolist()
    assert below_far == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3, abs=1e-12)
    assert below_near == pytest.approx(1 / 2, abs=1e-12)


def test_the_envelope_lifts_a_precision_that_rises_again() -> None:
    targets = torch.stack([row(x, 1) for x in (-2, 0, 2)])[None]
    predictions = torch.stack([row(-2, 0.9, colour=1), row(-2, 0.8), row(0, 0.7), row(2, 0.6)])[None]
    # hits 0, 1, 1, 1: precision 0, 1/2, 2/3, 3/4, and 3/4 is to the right of them all
    assert average_precision(predictions, targets, [1.0]).tolist() == pytest.approx([3 / 4], abs=1e-12)


def test_a_prediction_names_the_nearest_object_even_if_that_one_is_detected() -> None:
    targets = torch.stack([row(0, 1), row(1, 1)])[None]
    predictions = torch.stack([row(0.1, 0.9), row(0.2, 0.8)])[None]  # both are nearest to the first object
    assert average_precision(predictions, targets).tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.5])
    # one that is too far away leaves the object to the next
    predictions = torch.stack([row(0.4, 0.9), row(0.2, 0.8)])[None]
    assert average_precision(predictions, targets, [0.3]).tolist() == pytest.approx([1 / 2 * 1 / 2])


def test_the_distance_has_to_be_below_the_threshold() -> None:
    targets, predictions = row(0, 1)[None, None], row(1.5, 0.5)[None, None]
    assert average_precision(predictions, targets, [1.5, 1.5 + 1e-9]).tolist() == [0.0, 1.0]


@given(**SIZES)
@settings(max_examples=30, deadline=None)
def test_a_perfect_prediction_scores_one_whatever_padding_rows_say_last(**sizes: Any) -> None:
    _, targets = random_sets(**sizes)
    # several objects may stand in one place: a perfect prediction of the first alone would name both
    targets[..., :3] += torch.arange(targets.shape[1])[:, None] * 10.0
    assert average_precision(targets, targets).tolist() == [1.0] * 5


@given(**SIZES, order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_sets_and_images_have_no_order_and_thresholds_only_take_away(order: Any, **sizes: Any) -> None:
    predictions, targets = random_sets(**sizes)
    values = average_precision(predictions, targets)
    assert bool((values.diff() <= 1e-12).all()) and float(values[-1]) >= 0 and float(values[0]) <= 1 + 1e-12
    images, slots, rows = (torch.tensor(order.sample(range(n), n)) for n in (*predictions.shape[:2], targets.shape[1]))
    rescaled = predictions.clone()
    rescaled[..., 18] = rescaled[..., 18].exp() * 5  # confidences rank, no more
    places = targets[..., :3][targets[..., 18] == 1]
    if len(places.unique(dim=0)) == len(places):  # the first of two objects in the same place is named
        torch.testing.assert_close(average_precision(predictions, targets[:, rows]), values, rtol=0, atol=1e-12)
    for other in (
        average_precision(predictions[images], targets[images]),
        average_precision(predictions[:, slots], targets),
        average_precision(rescaled, targets),
    ):
        torch.testing.assert_close(other, values, rtol=0, atol=1e-12)


def over_threads(world: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """Runs work(rank, total) on each rank, where total adds up over the ranks as an all-reduce does."""
    barrier, handed, results = threading.Barrier(world, timeout=30), [torch.empty(0)] * world, [None] * world

    def run(rank: int) -> None:
        def total(values: Tensor) -> Tensor:
            handed[rank] = values
            barrier.wait()
            assert len({(tuple(one.shape), one.dtype) for one in handed}) == 1
            result = torch.stack(handed).sum(dim=0)
            barrier.wait()
            return result

        results[rank] = work(rank, total)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def parts(predictions: Tensor, targets: Tensor, edges: Sequence[int]) -> SetResults:
    results = SetResults.empty(predictions.shape[1], targets.shape[1])
    for start, end in pairwise(edges):
        results = results + SetResults.from_batch(predictions[start:end], targets[start:end])
    return results


@given(**SIZES, ties=st.booleans(), cuts=st.lists(st.integers(0, 5), max_size=3), world=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_batches_and_ranks_accumulate_to_the_whole(cuts: list[int], world: int, **sizes: Any) -> None:
    predictions, targets = random_sets(**sizes)
    count = len(predictions)
    whole = average_precision(predictions, targets)
    batches = parts(predictions, targets, [0, *sorted(min(cut, count) for cut in cuts), count])
    assert torch.equal(batches.average_precision(), whole)

    def rank_results(rank: int, total: Callable[[Tensor], Tensor]) -> SetResults:
        own = parts(predictions, targets, [rank * count // world, (rank + 1) * count // world])
        return own.over_ranks(total, rank, world)

    for gathered in over_threads(world, rank_results):
        assert torch.equal(gathered.predictions, predictions) and torch.equal(gathered.targets, targets)
        assert torch.equal(gathered.average_precision(), whole)


def test_padding_is_left_out_and_half_precision_is_kept_as_double() -> None:
    predictions, targets = random_sets(0, 5, 4, 4, 0.1, 0.2)
    counted = torch.tensor([True, False, True, True, False])
    results = SetResults.from_batch(predictions.bfloat16(), targets.float(), counted)
    assert results.predictions.dtype == results.targets.dtype == torch.float64
    assert torch.equal(results.predictions, predictions[counted].bfloat16().double())
    expected = average_precision(predictions[counted].bfloat16(), targets[counted].float())
    assert torch.equal(results.average_precision(), expected)


def test_without_any_object_there_is_no_average_precision() -> None:
    assert SetResults.empty(3, 4).average_precision().isnan().tolist() == [True] * 5
    assert average_precision(torch.zeros(2, 3, 19), torch.zeros(2, 4, 19)).isnan().tolist() == [True] * 5
    nobody = over_threads(2, lambda rank, total: SetResults.empty(3, 4).over_ranks(total, rank, 2))
    assert all(results.predictions.shape == (0, 3, 19) and results.targets.shape == (0, 4, 19) for results in nobody)


SETS = torch.zeros(2, 3, 19)


@pytest.mark.parametrize("function", [average_precision, SetResults.from_batch], ids=["function", "accumulator"])
@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        (SETS[0], SETS, r"^predictions: shape \(3, 19\) is not \[B, K, 19\]"),
        (SETS[..., :18], SETS, r"^predictions: shape \(2, 3, 18\) is not"),
        (SETS[:, :0], SETS, r"^predictions: shape \(2, 0, 19\) has no rows"),
        (SETS, SETS[:, :0], r"^targets: shape \(2, 0, 19\) has no rows"),
        (SETS, SETS[:1], r"^targets: shape \(1, 3, 19\) is not \[2, N, 19\]"),
        (SETS * torch.nan, SETS, r"^predictions: it holds NaN"),
        (SETS, SETS - torch.inf, r"^targets: it holds NaN or infinity"),
        (SETS, SETS + 0.5, r"^targets: is_real, the last column, is neither 0 nor 1"),
    ],
)
def test_what_is_wrong_with_the_sets_is_named(
    function: Callable[..., Any], predictions: Tensor, targets: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(predictions, targets)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_a_threshold_that_is_no_distance_is_named(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"^thresholds: .* is not positive"):
        average_precision(SETS, SETS, [1.0, threshold])
