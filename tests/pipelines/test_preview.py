"""The contact sheet: which samples, and every pixel where it should be."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import DataError
from pipelines.index import Index, index_from_counts
from pipelines.preview import chosen_samples, color, contact_sheet, overlay

MakeSet = Callable[..., Index]


@given(counts=st.lists(st.integers(1, 50), min_size=1, max_size=5), count=st.integers(1, 80), seed=st.integers(0, 99))
def test_the_samples_are_spread_over_the_set(counts: list[int], count: int, seed: int) -> None:
    index = index_from_counts(counts)
    total = index.num_samples
    chosen = chosen_samples(index, count, seed)
    assert len(chosen) == min(count, total) and chosen == chosen_samples(index, count, seed)
    for place, number in enumerate(chosen):  # one in each equal stretch
        assert place * total // len(chosen) <= number < (place + 1) * total // len(chosen)


def test_other_seeds_show_other_samples() -> None:
    index = index_from_counts([1000])
    assert len({tuple(chosen_samples(index, 5, seed)) for seed in range(20)}) == 20


def test_objects_have_colours_of_their_own_over_grey() -> None:
    assert len({color(label) for label in range(1, 65)}) == 64
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    masks = np.arange(20, dtype=np.uint8).reshape(4, 5) % 3
    seen = overlay(image, masks)
    grey = image.mean(axis=2)
    assert np.array_equal(seen[masks == 0], np.round(grey[masks == 0])[:, None].repeat(3, axis=1))
    for label in (1, 2):
        expected = 0.3 * grey[masks == label][:, None] + 0.7 * np.array(color(label))
        assert np.abs(seen[masks == label] - expected).max() <= 0.51


def test_the_sheet_holds_each_image_beside_its_masks(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(tmp_path, [3, 4])
    sheet = contact_sheet(tmp_path, count=7, columns=3)
    assert sheet.tobytes() == contact_sheet(tmp_path, count=7, columns=3).tobytes()
    pixels = np.array(sheet)
    scale = 16  # 8 x 6 is enlarged until the smaller side has 96
    height, width = 8 * scale, 6 * scale
    wide, high = 2 * width + 2 + 10, height + 14 + 10
    assert pixels.shape == (3 * high + 10, 3 * wide + 10, 3)
    for number in range(7):
        top, left = 10 + number // 3 * high + 14, 10 + number % 3 * wide
        picture = pixels[top : top + height, left : left + width]
        assert (picture == np.array([number, 0, 0])).all()  # as conftest paints it
        label = (number if number < 3 else number - 3) % 4
        tile = pixels[top : top + height, left + width + 2 : left + 2 * width + 2]
        image, masks = np.zeros((1, 1, 3), np.uint8), np.full((1, 1), label, np.uint8)
        image[..., 0] = number
        assert (tile == overlay(image, masks)).all()


def test_without_masks_there_is_the_image_alone(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(tmp_path, [2], {row: {"masks.png": None, "json": None} for row in range(2)})
    assert contact_sheet(tmp_path, count=9, columns=9).size == (2 * (96 + 10) + 10, 128 + 14 + 10 + 10)


def test_what_cannot_be_shown_is_named(tmp_path: Path, make_set: MakeSet) -> None:
    with pytest.raises(DataError, match="not complete"):
        contact_sheet(tmp_path)
    make_set(tmp_path, [2, 2], {3: {"image.png": b"broken"}})
    with pytest.raises(DataError, match=r"001\.tar: s1r1: image\.png cannot be decoded"):
        contact_sheet(tmp_path, count=4)
    for how in ({"count": 0}, {"columns": 0}):
        with pytest.raises(ValueError, match="less than 1"):
            contact_sheet(tmp_path, **how)
