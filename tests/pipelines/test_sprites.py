"""Multi-dSprites scenes are what the published sets say, checked on the pixels against polygons drawn by matplotlib."""

import colorsys
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Polygon
from numpy.typing import NDArray
from scipy import stats

from pipelines.scenes import RENDERERS, MultiDSprites, Scenes, render_shard
from pipelines.scenes.sprites import HEART_SIDE, OVAL_AXES, SCALES, SHAPES, SQUARE_SIDE

COLORINGS = {"colored_on_grayscale": (2, 5), "colored_on_colored": (1, 4), "binarized": (2, 3)}


def outline(shape: str) -> NDArray[np.float64]:
    """Corners [C, 2] of a sprite at scale 1, upright, its centre of mass at 0, y upwards."""
    angle = np.linspace(0, 2 * math.pi, 1000, endpoint=False)
    if shape == "oval":
        return np.stack([OVAL_AXES[0] * np.cos(angle), OVAL_AXES[1] * np.sin(angle)], axis=1)
    if shape == "square":
        return SQUARE_SIDE / 2 * np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    # From the tip up the right side, over both half discs, and down the left side.
    half = HEART_SIDE / 2
    arc = np.linspace(-math.pi / 4, 3 * math.pi / 4, 500)
    right = half / math.sqrt(2) * np.array([1, 1]) + half * np.stack([np.cos(arc), np.sin(arc)], axis=1)
    corners = np.concatenate([[[0, -half * math.sqrt(2)]], right, right[::-1] * [-1, 1]])
    x, y = corners.T
    following = np.roll(corners, -1, axis=0)
    cross = x * following[:, 1] - following[:, 0] * y
    centroid = ((corners + following) * cross[:, None]).sum(axis=0) / (3 * cross.sum())
    return corners - centroid


def covered(scenes: Scenes, row: int, i: int) -> NDArray[np.bool_]:
    """Pixels whose centres lie in a sprite, by its factors."""
    factors = {name: values[row, i] for name, values in scenes.factors.items()}
    angle = float(factors["orientation"])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = float(factors["scale"]) * outline(SHAPES[factors["shape"]]) @ turn.T
    # The factors are float32; the scene's grid is exact.
    centre = np.round(64 * np.array([factors["x"], factors["y"]], dtype=np.float64), 3)
    polygon = Polygon(corners * [1, -1] + centre)
    column, line = np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5)
    inside = polygon.contains_points(np.stack([column.ravel(), line.ravel()], axis=1))
    return inside.reshape(64, 64)


@pytest.mark.parametrize("coloring", COLORINGS)
def test_masks_are_the_sprites_that_the_factors_say_later_ones_on_top(coloring: Any) -> None:
    scenes = MultiDSprites(coloring).render_range(3, 0, 30)
    assert scenes.images.shape == (30, 64, 64, 3) and scenes.images.dtype == np.uint8
    assert scenes.masks.shape == (30, 64, 64) and scenes.masks.dtype == np.uint8
    occluded = 0
    for row in range(30):
        expected = np.zeros((64, 64), dtype=np.uint8)
        whole = []
        for i in range(scenes.num_objects[row]):
            sprite = covered(scenes, row, i)
            expected[sprite] = i + 1
            whole.append(sprite.sum())
        assert np.array_equal(expected, scenes.masks[row])
        for i, area in enumerate(whole):
            shown = (scenes.masks[row] == i + 1).sum()
            assert shown > 0
            assert scenes.factors["visibility"][row, i] == pytest.approx(shown / area)
            occluded += shown < area
    assert occluded > 5  # or the order was not looked at


@pytest.mark.parametrize("coloring", COLORINGS)
def test_the_picture_has_the_colours_of_the_factors_in_the_masks(coloring: Any) -> None:
    scenes = MultiDSprites(coloring).render_range(4, 100, 80)
    for row in range(80):
        image, masks = scenes.images[row], scenes.masks[row]
        background = np.unique(image[masks == 0], axis=0)
        assert len(background) == 1
        if coloring == "colored_on_grayscale":
            assert len(set(background[0].tolist())) == 1
        if coloring == "binarized":
            assert not background.any()
        for i in range(scenes.num_objects[row]):
            color = scenes.factors["color"][row, i]
            assert (abs(image[masks == i + 1] - 255 * color) <= 0.5 + 1e-4).all()
            assert coloring != "binarized" or (color == 1).all()


@pytest.mark.parametrize(("coloring", "counts"), COLORINGS.items())
def test_counts_are_uniform_in_the_published_range(coloring: Any, counts: tuple[int, int]) -> None:
    scenes = MultiDSprites(coloring).render_range(5, 0, 1500)
    found = np.bincount(scenes.num_objects)
    assert not found[: counts[0]].any() and len(found) == counts[1] + 1
    assert stats.chisquare(found[counts[0] :]).pvalue > 1e-3
    for values in scenes.factors.values():
        assert values.shape[:2] == (1500, counts[1])
        present = np.arange(counts[1]) < scenes.num_objects[:, None]
        assert (values[~present] == -1).all() and (values[present] >= 0).all()
    assert (scenes.masks.reshape(1500, -1).max(axis=1) == scenes.num_objects).all()


@pytest.fixture(scope="module")
def single() -> Scenes:
    """Scenes of one sprite each."""
    return MultiDSprites(sprites=(1, 1)).render_range(6, 0, 6000)


def test_factors_are_uniform_and_independent(single: Scenes) -> None:
    factors = single.factors
    shape, scale, turn, x, y = (
        np.unique(factors[name][:, 0], return_inverse=True) for name in ("shape", "scale", "orientation", "x", "y")
    )
    assert shape[0].tolist() == [0, 1, 2]
    assert scale[0] == pytest.approx(np.array(SCALES)) and np.diff(scale[0]) == pytest.approx(np.full(5, 0.1))
    assert turn[0] == pytest.approx(2 * math.pi / 40 * np.arange(40))
    assert 64 * x[0] == pytest.approx(np.arange(16.5, 48)) and 64 * y[0] == pytest.approx(np.arange(16.5, 48))
    for _, index in (shape, scale, turn, x, y):
        assert stats.chisquare(np.bincount(index)).pvalue > 1e-3
    for first, second in ((shape, scale), (scale, turn), (x, y), (shape, x)):
        table = np.zeros((len(first[0]), len(second[0])))
        np.add.at(table, (first[1], second[1]), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_colours_are_uniform_in_their_space() -> None:
    grey = MultiDSprites().render_range(7, 0, 1000)
    hsv = np.array([colorsys.rgb_to_hsv(*color) for color in grey.factors["color"][:, 0].tolist()])
    background = grey.images[:, 0, 0, 0] / 255
    free = MultiDSprites("colored_on_colored").render_range(7, 0, 1000)
    for uniform in (
        hsv[:, 0],
        2 * hsv[:, 1] - 1,
        2 * hsv[:, 2] - 1,
        background,
        *free.factors["color"][:, 0].T,
        *(free.images[:, 0, 0] / 255).T,
    ):
        assert stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_areas_are_those_of_the_curves(single: Scenes) -> None:
    area = {
        "oval": math.pi * math.prod(OVAL_AXES),
        "square": SQUARE_SIDE**2,
        "heart": HEART_SIDE**2 * (1 + math.pi / 4),
    }
    pixels = (single.masks == 1).sum(axis=(1, 2))
    for index, name in enumerate(SHAPES):
        of_shape = single.factors["shape"][:, 0] == index
        ratio = pixels[of_shape] / (single.factors["scale"][of_shape, 0] ** 2 * area[name])
        assert ratio.mean() == pytest.approx(1, abs=0.01) and ratio.std() < 0.08


def test_a_sprite_lies_around_its_centre_of_mass_and_within_the_picture(single: Scenes) -> None:
    assert not single.masks[:, [0, -1]].any() and not single.masks[:, :, [0, -1]].any()
    for row in range(500):
        line, column = np.nonzero(single.masks[row])
        assert (column.mean() + 0.5) == pytest.approx(64 * single.factors["x"][row, 0], abs=0.35)
        assert (line.mean() + 0.5) == pytest.approx(64 * single.factors["y"][row, 0], abs=0.35)


def test_no_two_scales_or_turns_of_a_sprite_look_the_same(single: Scenes) -> None:
    symmetry = {"oval": 2, "square": 4, "heart": 1}
    for index, name in enumerate(SHAPES):
        looks: dict[tuple[int, int], set[bytes]] = {}
        for row in np.flatnonzero(single.factors["shape"][:, 0] == index):
            line, column = (round(64 * float(single.factors[name][row, 0]) - 0.5) for name in ("y", "x"))
            centred = np.roll(single.masks[row], (32 - line, 32 - column), axis=(0, 1))
            turn = round(float(single.factors["orientation"][row, 0]) / (2 * math.pi / 40))
            key = round(10 * float(single.factors["scale"][row, 0])), turn % (40 // symmetry[name])
            looks.setdefault(key, set()).add(centred.tobytes())
        assert len(looks) == 240 // symmetry[name]
        assert all(len(look) == 1 for look in looks.values())
        assert len(set.union(*looks.values())) == len(looks)


def test_a_scene_with_a_sprite_that_shows_too_little_is_drawn_again() -> None:
    strict = MultiDSprites(sprites=(2, 8), min_pixels=40)
    scenes = strict.render_range(11, 0, 300)
    ids = scenes.masks.reshape(300, -1)
    shown = np.stack([(ids == i + 1).sum(axis=1) for i in range(8)], axis=1)
    present = np.arange(8) < scenes.num_objects[:, None]
    assert (shown[present] >= 40).all()
    # The count does not give way, and scenes that were good stay as they are.
    assert stats.chisquare(np.bincount(scenes.num_objects)[2:]).pvalue > 1e-3
    lenient = MultiDSprites(sprites=(2, 8)).render_range(11, 0, 300)
    few = (np.stack([(lenient.masks == i + 1).sum(axis=(1, 2)) for i in range(8)], axis=1) < 40) & present
    same = (lenient.masks == scenes.masks).all(axis=(1, 2))
    assert np.array_equal(same, ~few.any(axis=1)) and 30 < same.sum() < 270


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**60),
    cut=st.integers(0, 12),
    coloring=st.sampled_from(list(COLORINGS)),
)
def test_a_scene_does_not_depend_on_what_is_rendered_with_it(seed: int, first: int, cut: int, coloring: Any) -> None:
    renderer = MultiDSprites(coloring, min_pixels=30)  # so that some are drawn again
    together = renderer.render_range(seed, first, 12)
    parts = [renderer.render_range(seed, first, cut), renderer.render_range(seed, first + cut, 12 - cut)]
    assert np.array_equal(together.images, np.concatenate([part.images for part in parts]))
    assert np.array_equal(together.masks, np.concatenate([part.masks for part in parts]))
    for name, values in together.factors.items():
        assert np.array_equal(values, np.concatenate([part.factors[name] for part in parts]))


def test_seeds_shards_and_rows_differ() -> None:
    renderer = MultiDSprites()
    images = [renderer.render(seed, shard, 20).images for seed in (0, 1) for shard in (0, 1)]
    assert len(np.unique(np.concatenate(images).reshape(80, -1), axis=0)) == 80


def test_a_set_is_the_same_however_it_is_cut_into_shards(tmp_path: Path) -> None:
    def samples(folder: str, sizes: list[int]) -> list[dict[str, bytes]]:
        import webdataset

        found, first = [], 40
        for shard, size in enumerate(sizes):
            render_shard(tmp_path / folder, MultiDSprites(), 2, shard, size, first)
            first += size
            read = webdataset.WebDataset(str(tmp_path / folder / f"{shard:06d}.tar"), shardshuffle=False)
            found += [{name: sample[name] for name in ("image.png", "masks.png", "json")} for sample in read]
        return found

    whole, cut = samples("whole", [7]), samples("cut", [3, 4])
    assert len(whole) == 7 and whole == cut
    facts = json.loads(whole[0]["json"])
    assert len(facts["factors"]["visibility"]) == facts["num_objects"]
    assert set(facts["factors"]) == {"shape", "scale", "orientation", "x", "y", "color", "visibility"}


def test_the_default_is_the_set_by_name() -> None:
    assert RENDERERS["multi-dsprites"] == MultiDSprites("colored_on_grayscale")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coloring": "coloured"}, "coloring: 'coloured' .*binarized"),
        ({"sprites": (3, 2)}, r"sprites: \(3, 2\)"),
        ({"sprites": (0, 2)}, r"sprites: \(0, 2\)"),
        ({"sprites": 3}, "sprites: 3 is not a range"),
        ({"min_pixels": 0}, "min_pixels: 0"),
        ({"min_pixels": 1000}, "min_pixels: 1000"),
    ],
)
def test_impossible_parameters_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiDSprites(**fields)


def test_sprites_that_hide_each_other_say_so() -> None:
    with pytest.raises(ValueError, match=r"sprites: 32 sprites hide each other .*min_pixels: 60"):
        MultiDSprites(sprites=(32, 32), min_pixels=60).render_range(0, 0, 1)
    with pytest.raises(ValueError, match=r"place: .* outside \[0, 2\^64\)"):
        MultiDSprites().render_range(0, -1, 1)
