"""Values of each image, and the intervals of their means: against evaluation by sums, and textbook intervals."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from orchestration.assembly import Data, build_model, evaluation_batches
from orchestration.evaluate import evaluate
from orchestration.recipe import Recipe
from orchestration.scores import Estimate, NotFiniteError, Scores, difference_bound, score


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def scores_of(values: dict[str, Any], kept: Any = None, objects: Any = None) -> Scores:
    count = len(next(iter(values.values())))
    nothing = np.full(count, -1)
    given = [np.asarray(nothing if column is None else column, dtype=np.int64) for column in (kept, objects)]
    return Scores({name: np.asarray(column, dtype=np.float64) for name, column in values.items()}, *given, 9, 0)


def measured(recipe: Recipe, data: Data, batch_size: int = 8) -> Scores:
    evaluate = recipe.evaluate.model_copy(update={"batch_size": batch_size})
    stream, steps = evaluation_batches(recipe.model_copy(update={"evaluate": evaluate}), data.eval)
    seen: list[int] = []
    with stream:
        batches = (micro for step in range(steps) for micro in stream.step(step))
        model = build_model(recipe).eval()
        found = score({"it": model}, batches, background_slots={"it": 0}, seen=seen.append)
    assert sum(seen) == 30
    return found["it"]


def test_the_means_are_those_of_evaluation_by_sums(recipe: Recipe, data: Data) -> None:
    stream, steps = evaluation_batches(recipe, data.eval)
    with stream:
        batches = [micro for step in range(steps) for micro in stream.step(step)]
        summed = evaluate(build_model(recipe).eval(), batches, num_slots=4, background_slots=0).metrics()
    scores = measured(recipe, data)
    assert scores.images == 30
    assert scores.evaluation().metrics() == pytest.approx(summed, rel=1e-9)
    estimates = scores.estimates
    assert estimates.keys() == summed.keys() - {"count_error_of_best_constant"}
    for name, estimate in estimates.items():
        assert estimate.value == pytest.approx(summed[name], rel=1e-9), name
        assert estimate.low <= estimate.value <= estimate.high, name


def test_the_same_numbers_each_time_and_an_images_do_not_depend_on_its_batch(recipe: Recipe, data: Data) -> None:
    first, again = measured(recipe, data), measured(recipe, data)
    assert first.estimates == again.estimates
    for name, column in first.values.items():
        np.testing.assert_array_equal(column, again.values[name])
    # The plan deals images out to other batches of another size: told apart by their number of objects and their error.
    other = measured(recipe, data, batch_size=30)
    np.testing.assert_array_equal(np.sort(first.kept), np.sort(other.kept))
    for name, column in first.values.items():
        np.testing.assert_allclose(np.sort(column), np.sort(other.values[name]), rtol=1e-5, atol=1e-7)


def test_intervals_agree_with_the_textbooks() -> None:
    """The bootstrap's ends against the t interval of a mean, and Fisher's of a correlation."""
    rng = draw()
    values = rng.beta(8, 2, 600)
    objects = rng.integers(1, 6, 600)
    kept = np.clip(objects + rng.integers(-1, 2, 600), 0, 9)
    found = scores_of({"fg_ari": values}, kept, objects).estimates

    def agree(estimate: Estimate, low: float, high: float) -> None:
        width = high - low
        assert estimate.low == pytest.approx(low, abs=0.07 * width)
        assert estimate.high == pytest.approx(high, abs=0.07 * width)

    error = np.abs(kept - objects)
    for name, column in (("fg_ari", values), ("count_error", error), ("count_accuracy", error == 0)):
        sem = scipy.stats.sem(column)
        agree(found[name], *scipy.stats.t.interval(0.95, 599, loc=np.mean(column), scale=sem))
    correlation = scipy.stats.pearsonr(kept, objects)
    assert found["count_correlation"].value == pytest.approx(correlation.statistic, rel=1e-9)
    # Fisher's transform takes the two for normal; scipy's own resampling does not
    resampled = correlation.confidence_interval(0.95, scipy.stats.BootstrapMethod(rng=draw(1), method="percentile"))
    agree(found["count_correlation"], resampled.low, resampled.high)


def test_the_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    rng = draw(3)
    sets = [scores_of({"fg_ari": rng.beta(6, 2, 80)}).estimates["fg_ari"] for _ in range(300)]
    covered = sum(estimate.low <= 6 / 8 <= estimate.high for estimate in sets)
    assert 0.90 * 300 <= covered <= 0.985 * 300


def test_a_paired_bound_agrees_with_the_paired_t_test() -> None:
    rng = draw(4)
    hard = rng.normal(0, 1, 500)  # what makes an image hard is the same for both
    candidate, champion = 0.05 + hard + rng.normal(0, 0.2, 500), hard + rng.normal(0, 0.2, 500)
    difference, bound = difference_bound(candidate, champion, 0.95)
    paired = scipy.stats.ttest_rel(candidate, champion, alternative="greater").confidence_interval(0.95)
    assert difference == pytest.approx(np.mean(candidate) - np.mean(champion))
    assert bound == pytest.approx(paired.low, abs=0.1 * (difference - paired.low))
    apart = scipy.stats.ttest_ind(candidate, champion, alternative="greater").confidence_interval(0.95)
    assert bound > 0 > apart.low  # what only pairs can tell


def test_images_without_a_value_are_left_out() -> None:
    values = np.array([0.5, np.nan, 0.9, np.nan, 0.7])
    told = scores_of({"fg_ari": values, "ari": np.full(5, np.nan)})
    assert told.estimates == {"fg_ari": scores_of({"fg_ari": values[[0, 2, 4]]}).estimates["fg_ari"]}
    assert told.evaluation().means == pytest.approx({"fg_ari": 0.7})
    counted = scores_of({"ari": values}, kept=[1, 2, 3, 3, 3], objects=[1, -1, 3, -1, 2]).estimates
    assert counted["count_accuracy"].value == pytest.approx(2 / 3)
    assert counted["kept_mean"].value == pytest.approx(7 / 3)


def test_what_never_varies_is_sure() -> None:
    found = scores_of({"fg_ari": np.full(9, 0.3)}, kept=np.full(9, 3), objects=np.arange(9)).estimates
    assert (found["fg_ari"].low, found["fg_ari"].high) == (pytest.approx(0.3), pytest.approx(0.3))
    assert found["count_correlation"] == Estimate(0.0, 0.0, 0.0)
    assert difference_bound(np.full(9, 0.4), np.full(9, 0.4), 0.95) == (0.0, 0.0)


def test_one_image_has_a_value_and_no_interval() -> None:
    (estimate,) = scores_of({"fg_ari": [0.5]}).estimates.values()
    assert estimate.value == 0.5
    assert np.isnan([estimate.low, estimate.high]).all()
    assert np.isnan(difference_bound(np.ones(1), np.ones(1), 0.95)).all()


def test_a_model_that_is_not_finite_is_named(recipe: Recipe, data: Data) -> None:
    model = build_model(recipe).eval()
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(torch.nan)
    stream, steps = evaluation_batches(recipe, data.eval)
    with stream, pytest.raises(NotFiniteError, match="broken: what the model makes"):
        batches = (micro for step in range(steps) for micro in stream.step(step))
        score({"broken": model}, batches, background_slots={"broken": 0})
