"""The gate: floors, and a candidate against a champion on the same images. Numbers alone."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.recipe import RegistrySection
from orchestration.registry.gate import Verdict, judge
from orchestration.scores import Scores

IMAGES = 400


def scores(shift: float = 0.0, seed: int = 0, **changes: Any) -> Scores:
    """Of images whose difficulty is the same for every model; ``shift`` makes a model better on each."""
    hard = np.random.Generator(np.random.Philox(key=[7, 0])).normal(0, 0.1, IMAGES)
    own = np.random.Generator(np.random.Philox(key=[7, 1 + seed])).normal(0, 0.02, IMAGES)
    objects = np.arange(IMAGES) % 4 + 1
    values = {"reconstruction": 0.2 - hard - own - shift, "fg_ari": 0.7 + hard + own + shift} | changes
    return Scores(values, kept=objects, objects=objects, num_slots=5, background_slots=0)


def against(candidate: Scores, champion: Scores | None, same_target: bool = True, **gate: Any) -> Verdict:
    return judge(candidate, champion, RegistrySection(**gate), same_target=same_target, rival="version 2")


def test_the_first_has_floors_alone() -> None:
    assert against(scores(), None).passed
    assert against(scores(), None, floors={"fg_ari": 0.6, "count_accuracy": 1.0}).passed
    below = against(scores(fg_ari=np.full(IMAGES, 0.7)), scores(), floors={"fg_ari": 0.8})
    assert not below.passed
    assert below.reason == "registry.floors.fg_ari: 0.700 is below the floor 0.8"
    untold = against(scores(), None, floors={"mbo": 0.1})
    assert not untold.passed
    assert "the held-out set does not tell mbo" in untold.reason


@pytest.mark.parametrize("metric", [None, "fg_ari", "reconstruction"])
def test_better_passes_and_worse_does_not(metric: str | None) -> None:
    better = against(scores(0.01), scores(0.0, 1), metric=metric)
    assert better.passed, better.reason
    worse = against(scores(0.0, 1), scores(0.01), metric=metric)
    assert not worse.passed
    assert "of version 2 on the same 400 images" in worse.reason
    assert worse.comparison and better.comparison
    assert worse.comparison.difference == pytest.approx(-better.comparison.difference)
    assert better.comparison.bound <= better.comparison.difference


def test_equal_models_pass_and_luck_does_not() -> None:
    assert against(scores(), scores()).passed  # not worse on any image
    nearly = against(scores(0.0005, 3), scores(0.0, 4))  # within what the choice of images explains
    assert nearly.comparison is not None
    assert not nearly.passed
    assert against(scores(0.0005, 3), scores(0.0, 4), tolerated_loss=0.01).passed
    assert not against(scores(-0.02, 3), scores(0.0, 4), tolerated_loss=0.01).passed


@settings(deadline=None, max_examples=40)
@given(shift=st.floats(-0.02, 0.02), seed=st.integers(1, 50), confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_it_agrees_with_the_paired_t_test_wherever_that_is_clear(shift: float, seed: int, confidence: float) -> None:
    candidate, champion = scores(shift, seed), scores(0.0)
    paired = scipy.stats.ttest_rel(candidate.values["fg_ari"], champion.values["fg_ari"], alternative="greater")
    low = paired.confidence_interval(confidence).low
    if abs(low) > 3e-4:
        assert against(candidate, champion, confidence=confidence).passed == (low > 0)


def test_what_is_not_a_number_does_not_pass() -> None:
    broken = np.full(IMAGES, 0.9)
    broken[3] = np.nan
    assert not against(scores(fg_ari=np.full(IMAGES, np.nan)), None, floors={"fg_ari": 0.1}).passed
    assert not against(scores(fg_ari=broken), scores()).passed  # the champion has a value there
    assert against(scores(0.1, fg_ari=broken), scores(fg_ari=np.where(np.isnan(broken), np.nan, 0.5))).passed


def test_errors_of_different_targets_are_not_compared() -> None:
    refused = against(scores(0.1), scores(), same_target=False, metric="reconstruction")
    assert not refused.passed
    assert "version 2 reconstructs something else" in refused.reason
    assert against(scores(0.1), scores(), same_target=False).passed


def test_other_images_cannot_be_compared() -> None:
    other = Scores(scores().values, np.ones(IMAGES, dtype=np.int64), np.ones(IMAGES, dtype=np.int64), 5, 0)
    with pytest.raises(ValueError, match="of other images"):
        against(scores(), other)
    few = Scores({"fg_ari": np.ones(1)}, np.ones(1, dtype=np.int64), np.ones(1, dtype=np.int64), 5, 0)
    assert "too few held-out images to compare by fg_ari, 1;" in against(few, few).reason
