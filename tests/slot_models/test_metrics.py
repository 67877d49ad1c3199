"""Overlaps of masks with objects against exhaustive matching, and what all segmentation metrics have in common."""

import sys
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentations import scene
from sklearn.metrics import adjusted_rand_score, jaccard_score

from slot_models.metrics import (
    adjusted_rand_index,
    correct_localization,
    foreground_ari,
    mean_best_overlap,
    mean_iou,
    segmentation_metrics,
)

Metric = Callable[..., torch.Tensor]
OVERLAPS = {"mbo": mean_best_overlap, "miou": mean_iou, "corloc": correct_localization}
ALL = {"fg_ari": foreground_ari, **OVERLAPS}
SCENES = {
    "seed": st.integers(0, 2**32),
    "objects": st.integers(0, 4),
    "num_slots": st.integers(1, 5),
    "height": st.integers(1, 7),
    "width": st.integers(1, 7),
    "agreement": st.sampled_from([0.0, 0.5, 0.8, 1.0]),
}


def one_hot(labels: np.ndarray, num_slots: int) -> torch.Tensor:
    """[B, H, W] -> float [B, K, H, W]"""
    return torch.nn.functional.one_hot(torch.from_numpy(labels).long(), num_slots).movedim(-1, 1).float()


def by_hand(true: np.ndarray, labels: np.ndarray, num_slots: int) -> dict[str, float]:
    """The metrics of one image (flat arrays), one object and one slot at a time; matching by trying everything."""
    objects = [label for label in np.unique(true) if label > 0]
    if not objects:
        return dict.fromkeys(OVERLAPS, float("nan"))
    table = np.array(
        [[jaccard_score(true == o, labels == k, zero_division=0) for k in range(num_slots)] for o in objects]
    )
    padded = np.hstack([table, np.zeros((len(objects), len(objects)))])  # so that an object may stay without a slot
    sums = [
        sum(padded[row, column] for row, column in enumerate(columns))
        for columns in permutations(range(padded.shape[1]), len(objects))
    ]
    best = table.max(axis=1)
    return {"mbo": best.mean(), "miou": max(sums) / len(objects), "corloc": float(any(best > 0.5))}


@given(**SCENES)
@settings(max_examples=60, deadline=None)
def test_overlaps_equal_those_of_one_object_and_one_slot_at_a_time(**sizes: int) -> None:
    true, masks = scene(**sizes)
    labels = masks.argmax(dim=1).flatten(1).numpy()
    expected = [by_hand(a, b, masks.shape[1]) for a, b in zip(true.flatten(1).numpy().astype(int), labels, strict=True)]
    for name, metric in OVERLAPS.items():
        values = metric(true, masks)
        assert values.dtype == torch.float64 and values.shape == true.shape[:1]
        np.testing.assert_allclose(values, [one[name] for one in expected], rtol=0, atol=1e-12, err_msg=name)


@given(**SCENES)
@settings(max_examples=40, deadline=None)
def test_all_metrics_at_once_are_the_metrics_one_by_one(**sizes: int) -> None:
    true, masks = scene(**sizes)
    values = segmentation_metrics(true, masks)
    assert list(values) == ["ari", "fg_ari", "mbo", "miou", "corloc"]
    has_object = (true > 0).flatten(1).any(dim=1)
    for name, metric in ALL.items():
        expected = torch.where(has_object, metric(true, masks), torch.nan)
        np.testing.assert_array_equal(values[name], expected, err_msg=name)
    labels = masks.argmax(dim=1).flatten(1)
    expected_ari = [adjusted_rand_score(a, b) for a, b in zip(true.flatten(1), labels, strict=True)]
    np.testing.assert_allclose(values["ari"], expected_ari, rtol=0, atol=1e-12)


@given(**SCENES, order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_names_of_slots_and_objects_and_the_images_around_do_not_matter(order, **sizes) -> None:  # type: ignore[no-untyped-def]
    true, masks = scene(**sizes)
    values = segmentation_metrics(true, masks)

    slots = torch.tensor(order.sample(range(masks.shape[1]), masks.shape[1]))
    names = torch.tensor([0, *order.sample([1, 2, 3, 4, 250, 1023, 1024, 1025, 2**24, 2**40], 4)])  # 0 is background
    images = torch.tensor(order.sample(range(3), 3))
    scaled = segmentation_metrics(true, 3 * masks - 50)
    permuted = segmentation_metrics(true, masks[:, slots])
    renamed = segmentation_metrics(names[true.long()], masks)
    moved = segmentation_metrics(true[images], masks[images])
    alone = [segmentation_metrics(true[i : i + 1], masks[i : i + 1]) for i in range(3)]
    for name, expected in values.items():
        for other in (scaled[name], permuted[name], renamed[name], torch.cat([one[name] for one in alone])):
            np.testing.assert_allclose(other, expected, rtol=0, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(moved[name], expected[images], rtol=0, atol=1e-12, err_msg=name)


@given(**SCENES)
@settings(max_examples=40, deadline=None)
def test_matching_one_to_one_never_beats_the_best_overlap_and_a_good_overlap_is_located(**sizes: int) -> None:
    values = segmentation_metrics(*scene(**sizes))
    has_object = ~values["mbo"].isnan()
    assert torch.equal(has_object, ~values["corloc"].isnan())
    mbo, miou, corloc = (values[name][has_object] for name in ("mbo", "miou", "corloc"))
    assert bool((miou <= mbo + 1e-12).all()) and bool((miou >= 0).all()) and bool((mbo <= 1 + 1e-12).all())
    assert bool((corloc >= (mbo > 0.5)).all())  # some object is at least as good as their mean


def test_a_perfect_segmentation_is_perfect_by_every_metric() -> None:
    true = np.array([[[0, 1, 1], [0, 2, 2], [3, 3, 0]], [[1, 1, 1], [1, 1, 1], [1, 1, 1]]])
    masks = one_hot(true, 5)[:, [4, 2, 0, 3, 1]]  # one slot stays empty
    for name, values in segmentation_metrics(torch.from_numpy(true), masks).items():
        assert values.tolist() == [1.0, 1.0], name


def test_overlaps_of_an_example_worked_out_by_hand() -> None:
    # Object 1 has 4 pixels, object 2 has 2, the background 2. Slot 0 covers 3 pixels of object 1 and both of object 2,
    # slot 1 the fourth pixel of object 1 and the background.
    true = torch.tensor([[[1, 1, 1, 1], [2, 2, 0, 0]]])
    labels = np.array([[[0, 0, 0, 1], [0, 0, 1, 1]]])
    # Overlaps: object 1 with slot 0: 3 / 6, with slot 1: 1 / 6; object 2 with slot 0: 2 / 5, with slot 1: 0 / 5.
    values = segmentation_metrics(true, one_hot(labels, 2))
    assert values["mbo"].tolist() == pytest.approx([(3 / 6 + 2 / 5) / 2], abs=1e-15)
    assert values["miou"].tolist() == pytest.approx([(1 / 6 + 2 / 5) / 2], abs=1e-15)  # above (3 / 6 + 0) / 2
    assert values["corloc"].tolist() == [0.0]  # exactly a half is not above a half
    more = one_hot(np.array([[[0, 0, 0, 1], [1, 1, 1, 1]]]), 2)  # object 1 with slot 0: 3 / 4
    assert correct_localization(true, more).tolist() == [1.0]


def test_an_object_without_a_slot_counts_as_missed() -> None:
    true = torch.tensor([[[1, 1, 2, 2, 3, 3]]])
    one_slot = torch.zeros(1, 1, 1, 6)
    assert mean_iou(true, one_slot).tolist() == pytest.approx([1 / 9])  # one of three objects, overlap 2 / 6
    assert mean_best_overlap(true, one_slot).tolist() == pytest.approx([1 / 3])


def test_pixels_go_to_the_first_of_equally_large_masks() -> None:
    true = torch.tensor([[[1, 1, 2, 2]]])
    masks = torch.tensor([[[[5.0, 5, 0, 0]], [[5.0, 5, 1, 1]], [[-torch.inf, 0, 1, 1]]]])
    assert mean_best_overlap(true, masks).tolist() == [1.0]


def test_large_ids_stay_objects_where_no_pixel_is_background() -> None:
    true = torch.tensor([[[1, 1, 2**24, 2**24]]])  # ids of a panoptic segmentation
    assert mean_best_overlap(true, torch.zeros(1, 1, 1, 4)).tolist() == [0.5]
    assert mean_iou(true, torch.zeros(1, 1, 1, 4)).tolist() == [0.25]


@given(**SCENES)
@settings(max_examples=40, deadline=None)
def test_ignored_pixels_count_nowhere(**sizes: int) -> None:
    true, masks = scene(**sizes)
    true, masks = true[:1].flatten(1)[:, None], masks[:1].flatten(2)[:, :, None]  # one image, one row of pixels
    void = torch.from_numpy(np.random.default_rng(sizes["seed"]).random(true.shape) < 0.4)
    without = segmentation_metrics(true[~void][None, None], masks[:, :, ~void[0]][:, :, None])
    for label in (255, -1, sizes["objects"]):
        marked = torch.where(void, label, true.short())
        void_too = marked == label
        if label == sizes["objects"]:  # a label of the scene itself
            without = segmentation_metrics(true[~void_too][None, None], masks[:, :, ~void_too[0]][:, :, None])
        for name, values in segmentation_metrics(marked, masks, ignore=label).items():
            np.testing.assert_allclose(values, without[name], rtol=0, atol=1e-12, err_msg=name)
            metric = ALL.get(name)
            if metric is not None and not values.isnan().any():
                np.testing.assert_array_equal(metric(marked, masks, ignore=label), values, err_msg=name)


def test_an_image_without_objects_has_no_value_and_leaves_the_others_alone() -> None:
    true, masks = scene(0, 3, 4, 6, 6, 0.8)
    with_empty = true.clone()
    with_empty[1] = 0
    before, after = segmentation_metrics(true, masks), segmentation_metrics(with_empty, masks)
    for name in ("fg_ari", "mbo", "miou", "corloc"):
        assert after[name].isnan().tolist() == [False, True, False], name
        assert torch.equal(after[name][[0, 2]], before[name][[0, 2]]), name
    assert not after["ari"].isnan().any()  # everything is background: a cluster
    empty = segmentation_metrics(torch.zeros_like(true), masks)
    assert all(bool(empty[name].isnan().all()) for name in ("fg_ari", "mbo", "miou", "corloc"))


@pytest.mark.parametrize("name", ALL)
def test_no_images_give_no_values_of_any_metric(name: str) -> None:
    values = ALL[name](torch.zeros(0, 4, 4, dtype=torch.uint8), torch.zeros(0, 3, 4, 4))
    assert values.shape == (0,) and values.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_precision_of_the_masks_only_rounds_them(dtype: torch.dtype) -> None:
    true, masks = scene(3, 4, 5, 7, 7, 0.8)
    rounded = masks.to(dtype)
    expected = segmentation_metrics(true, one_hot(rounded.double().argmax(dim=1).numpy(), 5))
    for name, values in segmentation_metrics(true, rounded).items():
        assert torch.equal(values, expected[name]), name


TRUE, MASKS = torch.ones(2, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize("metric", [*ALL.values(), segmentation_metrics], ids=[*ALL, "all"])
@pytest.mark.parametrize(
    ("true", "masks", "message"),
    [
        (TRUE[0], MASKS, r"^true_masks: shape \(4, 4\) is not \[B, H, W\]"),
        (TRUE[:, None], MASKS, r"^true_masks: shape \(2, 1, 4, 4\) is not"),
        (TRUE, MASKS[:, 0], r"^predicted_masks: shape \(2, 4, 4\) is not"),
        (TRUE, MASKS[:1], r"^predicted_masks: shape \(1, 3, 4, 4\) is not \[2, K"),
        (TRUE, MASKS[:, :0], r"^predicted_masks: there are no slots"),
        (TRUE, MASKS[..., :3], r"^true_masks: size \(4, 4\) differs from predicted_masks' \(4, 3\)"),
        (TRUE, MASKS.long(), r"^predicted_masks: dtype torch.int64"),
        (TRUE, MASKS.index_fill(1, torch.tensor([2]), torch.nan), r"^predicted_masks: it holds NaN"),
        (TRUE.float(), MASKS, r"^true_masks: dtype torch.float32"),
        (TRUE.long() - 2, MASKS, r"^true_masks: label -1 is negative"),
    ],
)
def test_what_is_wrong_with_the_masks_is_named(
    metric: Metric, true: torch.Tensor, masks: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric(true, masks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3).long(), torch.zeros(3).long()), r"^true: shape \(3,\) is not \[B, N\]"),
        ((torch.zeros(1, 3).long(), torch.zeros(1, 4).long()), r"^predicted: shape \(1, 4\) is not \[1, 3\]"),
        ((torch.zeros(1, 3).long(), torch.zeros(1, 3).long(), torch.ones(1, 2).bool()), r"^weight: shape \(1, 2\)"),
        ((torch.zeros(1, 3).long(), torch.zeros(1, 3)), r"^predicted: dtype torch.float32"),
        ((torch.zeros(1, 3).long(), torch.zeros(1, 3).long() - 7), r"^predicted: label -7 is negative"),
    ],
)
def test_what_is_wrong_with_the_labels_is_named(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adjusted_rand_index(*arguments)


def test_matching_without_scipy_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r'pip install "slotforge\[models\]"'):
        mean_iou(TRUE, MASKS)
    assert mean_best_overlap(TRUE, MASKS).tolist() == [1.0, 1.0]  # the others do without
