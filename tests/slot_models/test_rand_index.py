"""The adjusted Rand index, over all points and over the true foreground, against scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from slot_models.metrics import (
    adjusted_rand_index,
    foreground_ari,
)


@st.composite
def labelings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two labelings [B, N] of the same points, each with one to six clusters; N may be 0."""
    shape, seed = (draw(st.integers(1, 4)), draw(st.integers(0, 40))), draw(st.integers(0, 2**32))
    random = np.random.default_rng(seed)
    true = random.integers(0, draw(st.integers(1, 6)), shape)
    predicted = random.integers(0, draw(st.integers(1, 6)), shape)
    agree = random.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    return true, np.where(agree, true, predicted)


def index(true: np.ndarray, predicted: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    weights = None if weight is None else torch.from_numpy(weight)
    result = adjusted_rand_index(torch.from_numpy(true), torch.from_numpy(predicted), weights)
    assert result.dtype == torch.float64 and result.shape == true.shape[:1]
    return result.numpy()


@given(pair=labelings())
@settings(max_examples=80, deadline=None)
def test_the_index_equals_scikit_learns(pair: tuple[np.ndarray, np.ndarray]) -> None:
    true, predicted = pair
    expected = [adjusted_rand_score(a, b) for a, b in zip(true, predicted, strict=True)]
    np.testing.assert_allclose(index(true, predicted), expected, rtol=0, atol=1e-12)


@given(pair=labelings(), seed=st.integers(0, 2**32), share=st.sampled_from([0.0, 0.1, 0.6, 1.0]))
@settings(max_examples=80, deadline=None)
def test_a_weighted_index_is_that_of_the_points_that_count(
    pair: tuple[np.ndarray, np.ndarray], seed: int, share: float
) -> None:
    true, predicted = pair
    weight = np.random.default_rng(seed).random(true.shape) < share
    expected = [adjusted_rand_score(a[w], b[w]) for a, b, w in zip(true, predicted, weight, strict=True)]
    np.testing.assert_allclose(index(true, predicted, weight), expected, rtol=0, atol=1e-12)


@given(pair=labelings(), order=st.permutations(range(12)))
@settings(max_examples=40, deadline=None)
def test_names_of_clusters_and_order_of_points_do_not_matter(
    pair: tuple[np.ndarray, np.ndarray], order: list[int]
) -> None:
    true, predicted = pair
    names, points = np.array(order), np.argsort(np.random.default_rng(order).random(true.shape[1]))
    value = index(true, predicted)
    np.testing.assert_allclose(index(names[true], predicted), value, rtol=0, atol=1e-12)
    np.testing.assert_allclose(index(true[:, points], names[predicted][:, points]), value, rtol=0, atol=1e-12)
    np.testing.assert_allclose(index(predicted, true), value, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(index(true, names[true]), 1.0)


def test_large_images_keep_their_precision() -> None:
    random = np.random.default_rng(0)
    true = random.integers(0, 11, (2, 240 * 320))
    predicted = np.where(random.random(true.shape) < 0.3, random.integers(0, 11, true.shape), true)
    expected = [adjusted_rand_score(a, b) for a, b in zip(true, predicted, strict=True)]
    np.testing.assert_allclose(index(true, predicted), expected, rtol=0, atol=1e-12)
    single = np.zeros_like(true)
    np.testing.assert_array_equal(index(single, single), 1.0)


@given(
    seed=st.integers(0, 2**32),
    objects=st.integers(0, 5),
    num_slots=st.integers(1, 7),
    height=st.integers(1, 8),
    width=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_foreground_ari_is_scikit_learns_over_the_true_foreground(
    seed: int, objects: int, num_slots: int, height: int, width: int
) -> None:
    random = np.random.default_rng(seed)
    true = random.integers(0, objects + 1, (3, height, width), dtype=np.uint8)
    scores = random.random((3, num_slots, height, width))
    labels = scores.argmax(axis=1)
    expected = [adjusted_rand_score(a[a > 0], b[a > 0]) for a, b in zip(true, labels, strict=True)]
    masks, predicted = torch.from_numpy(true), torch.from_numpy(scores)
    np.testing.assert_allclose(foreground_ari(masks, predicted), expected, rtol=0, atol=1e-12)

    # Neither the scale of the prediction nor what it says of the background matters.
    np.testing.assert_allclose(foreground_ari(masks, 7 * predicted - 3), expected, rtol=0, atol=1e-12)
    elsewhere = torch.where(masks[:, None] == 0, torch.from_numpy(random.random(scores.shape)), predicted)
    np.testing.assert_allclose(foreground_ari(masks, elsewhere), expected, rtol=0, atol=1e-12)


def test_a_perfect_segmentation_scores_one_and_a_single_slot_zero() -> None:
    true = torch.tensor([[[0, 1, 1], [0, 2, 2], [3, 3, 0]]])
    perfect = torch.nn.functional.one_hot(true, 4).movedim(-1, 1).float()
    assert foreground_ari(true, perfect[:, [2, 0, 3, 1]]).tolist() == [1.0]
    assert foreground_ari(true, torch.ones(1, 1, 3, 3)).tolist() == [0.0]


def test_no_images_give_no_values() -> None:
    assert foreground_ari(torch.zeros(0, 4, 4, dtype=torch.long), torch.zeros(0, 3, 4, 4)).shape == (0,)


def test_different_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"^true_masks: size \(4, 4\) differs from predicted_masks' \(5, 4\)"):
        foreground_ari(torch.zeros(1, 4, 4, dtype=torch.long), torch.zeros(1, 3, 5, 4))
