"""Crops, resizes and augmentation against torch and Pillow, and against what each pixel must be."""

import os
import subprocess
import sys
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.noise import Purpose, generator
from pipelines.transforms import (
    AUGMENTATION_NOISE,
    Augmentation,
    count_objects,
    crop_centre,
    crop_clevr,
    flip,
    normalise,
    resize_bilinear,
    resize_nearest,
    to_model,
    to_pixels,
)

SIZES = st.integers(1, 24)


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def uniform(step: int = 0, place: int = 0) -> np.ndarray:
    return generator(3, Purpose.AUGMENTATION, step, place).random(AUGMENTATION_NOISE)


def test_the_clevr_crop_is_the_published_one() -> None:
    row, column = np.mgrid[:240, :320]
    cut = crop_clevr(np.stack([row, column], axis=2))
    assert cut.shape == (192, 192, 2)
    assert tuple(cut[0, 0]) == (29, 64) and tuple(cut[-1, -1]) == (220, 255)
    with pytest.raises(ValueError, match="240x320, this one is 320x240"):
        crop_clevr(np.zeros((320, 240)))


@given(height=SIZES, width=SIZES)
def test_the_centre_square_lies_in_the_middle(height: int, width: int) -> None:
    row, column = np.mgrid[:height, :width]
    cut = crop_centre(np.stack([row, column], axis=2))
    side = min(height, width)
    assert cut.shape[:2] == (side, side)
    for axis, length in ((0, height), (1, width)):
        before, after = cut[..., axis].min(), length - 1 - cut[..., axis].max()
        assert after - before in (0, 1)


@settings(max_examples=60, deadline=None)
@given(old=st.tuples(SIZES, SIZES), new=st.tuples(SIZES, SIZES), seed=st.integers(0, 9))
def test_bilinear_is_torchs(old: tuple[int, int], new: tuple[int, int], seed: int) -> None:
    image = noise_image(*old, seed)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    oracle = torch.nn.functional.interpolate(planes, new, mode="bilinear", align_corners=False, antialias=False)
    difference = np.abs(resize_bilinear(image, new).astype(float) - oracle[0].permute(1, 2, 0).numpy())
    assert difference.max() <= 0.5 + 1e-3  # rounding, and float32 at a tie


@settings(max_examples=60, deadline=None)
@given(old=st.tuples(SIZES, SIZES), new=st.tuples(SIZES, SIZES))
def test_nearest_takes_the_pixel_that_the_centre_lies_in(old: tuple[int, int], new: tuple[int, int]) -> None:
    ids = np.arange(old[0] * old[1]).reshape(old)
    found = resize_nearest(ids, new)
    places = [[Fraction(2 * i + 1, 2) * o / n for i in range(n)] for o, n in zip(old, new, strict=True)]
    assert np.array_equal(found, ids[np.ix_(*[[floor(place) for place in axis] for axis in places])])
    pillow = np.array(Image.fromarray(ids.astype(np.float32)).resize((new[1], new[0]), Image.Resampling.NEAREST))
    inside = np.ix_(*[[place.denominator > 1 for place in axis] for axis in places])  # on an edge Pillow rounds
    assert np.array_equal(found[inside], pillow[inside])


def test_nothing_changes_by_default() -> None:
    image, masks = noise_image(7, 9), noise_image(7, 9)[..., 0]
    for place in range(20):
        out, ids = Augmentation()(image, masks, uniform(place=place))
        assert np.array_equal(out, image) and np.array_equal(ids, masks)  # type: ignore[arg-type]


@given(seed=st.integers(0, 50), smallest=st.floats(0.2, 1.0))
@settings(max_examples=50, deadline=None)
def test_masks_move_with_their_image(seed: int, smallest: float) -> None:
    ids = np.random.default_rng(seed).integers(0, 5, (4, 5)).repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)
    image = np.repeat(ids[..., None] * np.uint8(50), 3, axis=2)
    out, masks = Augmentation(flip=0.5, crop=(smallest, 1.0))(image, ids, uniform(seed))
    assert out.shape == image.shape and out.dtype == np.uint8 and masks is not None and masks.shape == ids.shape
    assert out.flags.c_contiguous and masks.flags.c_contiguous
    inner = np.ones(masks.shape, dtype=bool)  # where all neighbours have one id the image shows its colour
    for down in range(-6, 7):
        for across in range(-6, 7):
            inner &= np.roll(masks, (down, across), (0, 1)) == masks
    assert np.array_equal(out[inner][:, 0], masks[inner] * 50)
    assert set(np.unique(masks)) <= set(np.unique(ids)) and count_objects(masks) <= count_objects(ids)


def test_crops_reach_every_corner_and_no_further() -> None:
    row, column = np.mgrid[:40, :60]
    ids = row * 60 + column
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    ends = [0.0, 1 - 1e-9]
    shares = np.array(np.meshgrid(ends, [0.0, 0.5, 1 - 1e-9], ends, ends)).reshape(4, -1)
    corners = set()
    for noise in shares.T:
        _, seen = Augmentation(flip=0.5, crop=(0.5, 1.0))(image, ids, noise)
        assert seen is not None
        side = round(60 * (0.5 + 0.5 * noise[1]))
        assert np.ptp(seen % 60) == side - 1
        corners.add((int(seen.min()), int(seen.max())))
        assert (seen[0, 0] % 60 > seen[0, -1] % 60) == (noise[0] < 0.5)
    assert (0, 19 * 60 + 29) in corners and (20 * 60 + 30, 39 * 60 + 59) in corners and (0, 40 * 60 - 1) in corners


def test_flips_come_as_often_as_they_should() -> None:
    image = noise_image(2, 3)
    flipped = sum(
        np.array_equal(Augmentation(flip=0.25)(image, None, uniform(place=place))[0], flip(image))
        for place in range(2000)
    )
    assert abs(flipped - 500) < 4 * np.sqrt(2000 * 0.25 * 0.75)  # four standard deviations


def test_what_cannot_be_augmented_is_refused() -> None:
    for fields, message in (({"flip": 1.5}, "flip: 1.5"), ({"crop": (0.9, 0.8)}, "crop"), ({"crop": (0, 1)}, "crop")):
        with pytest.raises(ValueError, match=message):
            Augmentation(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"noise: \[3\]"):
        Augmentation()(noise_image(4, 4), None, np.zeros(3))
    with pytest.raises(ValueError, match="masks are"):
        Augmentation()(noise_image(4, 4), np.zeros((4, 5)), np.zeros(4))


def test_objects_are_counted_without_the_background() -> None:
    assert count_objects(np.array([[0, 0], [0, 0]])) == 0
    assert count_objects(np.array([[3, 0], [7, 300]])) == 3
    assert count_objects(np.array([[2, 2]])) == 1


def test_normalised_is_the_formula() -> None:
    images = np.stack([noise_image(3, 4, seed) for seed in range(2)])
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = ((images / 255.0 - mean) / deviation).transpose(0, 3, 1, 2)
    found = normalise(images, mean, deviation)
    assert found.dtype == np.float32 and np.allclose(found, expected, atol=2e-6)
    assert np.allclose(normalise(images, (0.5,) * 3, (0.5,) * 3), to_model(images).numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="give 3 of each"):
        normalise(images, (0.5,), (0.5,))
    with pytest.raises(ValueError, match="give 3 of each"):
        normalise(images, mean, (0.2, 0.2, 0.0))


def test_pixels_come_back_from_the_model() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_pixels(to_model(pixels)), pixels)


def test_augmenting_takes_no_torch() -> None:
    program = "import sys, pipelines.transforms; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0
