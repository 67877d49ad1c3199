"""Scenes are what the published set says, checked on the pixels."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from pipelines.scenes.tetrominoes import COLORS, SHAPES, Tetrominoes

# The seven free tetrominoes as cells; all their rotations and reflections are the nineteen fixed ones.
FREE = ["####", "##/##", "###/.#.", ".##/##.", "###/#.."]


def fixed_tetrominoes() -> set[bytes]:
    found = set()
    for drawing in FREE:
        piece = np.array([[cell == "#" for cell in line] for line in drawing.split("/")])
        for mirrored in (piece, piece[:, ::-1]):
            for turns in range(4):
                turned = np.rot90(mirrored, turns)
                found.add(f"{turned.shape}".encode() + np.ascontiguousarray(turned).tobytes())
    return found


def test_seventeen_of_the_nineteen_fixed_tetrominoes() -> None:
    drawn = set()
    for lines in SHAPES.values():
        piece = np.array([[cell == "#" for cell in line] for line in lines])
        drawn.add(f"{piece.shape}".encode() + piece.tobytes())
    everything = fixed_tetrominoes()
    assert len(everything) == 19
    assert len(drawn) == len(SHAPES) == 17 and drawn < everything
    z = np.array([[True, True, False], [False, True, True]])
    upright = np.ascontiguousarray(np.rot90(z))
    missing = {f"{piece.shape}".encode() + piece.tobytes() for piece in (z, upright)}
    assert everything - drawn == missing


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    shard=st.integers(0, 10**6),
    fewest=st.integers(1, 3),
    more=st.integers(0, 1),
    grid=st.integers(7, 9),
    cell=st.integers(1, 5),
)
def test_every_object_is_one_whole_piece(seed: int, shard: int, fewest: int, more: int, grid: int, cell: int) -> None:
    pieces = (fewest, fewest + more)
    scenes = Tetrominoes(pieces, grid, cell).render(seed, shard, 6)
    side = grid * cell
    assert scenes.images.shape == (6, side, side, 3) and scenes.images.dtype == np.uint8
    assert scenes.masks.shape == (6, side, side) and scenes.masks.dtype == np.uint8
    assert scenes.num_objects.dtype == np.int64
    for row in range(6):
        image, masks, count = scenes.images[row], scenes.masks[row], scenes.num_objects[row]
        assert pieces[0] <= count <= pieces[1]
        assert set(np.unique(masks)) == set(range(count + 1))
        assert not image[masks == 0].any()
        for i in range(count):
            mask = masks == i + 1
            # Four cells of equal area, no overlap: another piece on top would take some away.
            assert mask.sum() == 4 * cell**2
            assert ndimage.label(mask)[1] == 1
            ys, xs = np.nonzero(mask)
            box = mask[ys.min() : ys.max() + 1 : cell, xs.min() : xs.max() + 1 : cell]
            drawing = tuple("".join(".#"[int(on)] for on in line) for line in box)
            assert drawing == list(SHAPES.values())[scenes.factors["shape"][row, i]]
            color = list(COLORS.values())[scenes.factors["color"][row, i]]
            assert (image[mask] == color).all()
            assert scenes.factors["x"][row, i] == pytest.approx((xs.mean() + 0.5) / side, abs=1e-6)
            assert scenes.factors["y"][row, i] == pytest.approx((ys.mean() + 0.5) / side, abs=1e-6)
        for values in scenes.factors.values():
            assert values.shape == (6, pieces[1])
            assert (values[row, count:] == -1).all() and (values[row, :count] >= 0).all()


def test_the_defaults_are_the_published_set() -> None:
    scenes = Tetrominoes().render(0, 0, 50)
    assert scenes.images.shape == (50, 35, 35, 3)
    assert (scenes.num_objects == 3).all()
    assert len({tuple(color) for color in scenes.images.reshape(-1, 3).tolist()}) == 7  # six colours and black


def test_counts_colours_first_shapes_and_positions_are_uniform() -> None:
    scenes = Tetrominoes((2, 4), 7, 1).render(11, 0, 6000)
    assert stats.chisquare(np.bincount(scenes.num_objects)[2:]).pvalue > 1e-3
    for i in range(4):
        color = scenes.factors["color"][:, i]
        assert stats.chisquare(np.bincount(color[color >= 0], minlength=6)).pvalue > 1e-3
    assert stats.chisquare(np.bincount(scenes.factors["shape"][:, 0], minlength=17)).pvalue > 1e-3
    # Colours are independent of each other.
    pairs = np.histogram2d(scenes.factors["color"][:, 0], scenes.factors["color"][:, 1], bins=6)[0]
    assert stats.chi2_contingency(pairs).pvalue > 1e-3
    # An upright bar has 7 columns x 4 rows of places, each as likely.
    bars = scenes.factors["shape"][:, 0] == list(SHAPES).index("I1")
    places = np.stack([scenes.factors["x"][bars, 0], scenes.factors["y"][bars, 0]], axis=1)
    _, counts = np.unique(places.round(4), axis=0, return_counts=True)
    assert len(counts) == 28 and stats.chisquare(counts).pvalue > 1e-3


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), shard=st.integers(0, 1000), few=st.integers(0, 20))
def test_a_row_does_not_depend_on_how_many_are_rendered(seed: int, shard: int, few: int) -> None:
    renderer = Tetrominoes((2, 4), 7, 2)
    many, some = renderer.render(seed, shard, 20), renderer.render(seed, shard, few)
    assert np.array_equal(many.images[:few], some.images)
    assert np.array_equal(many.masks[:few], some.masks)
    assert all(np.array_equal(many.factors[name][:few], some.factors[name]) for name in many.factors)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), first=st.integers(0, 2**60), cut=st.integers(0, 20))
def test_a_scene_by_index_does_not_depend_on_the_others(seed: int, first: int, cut: int) -> None:
    renderer = Tetrominoes((2, 4), 7, 2)
    together = renderer.render_range(seed, first, 20)
    parts = [renderer.render_range(seed, first, cut), renderer.render_range(seed, first + cut, 20 - cut)]
    assert np.array_equal(together.images, np.concatenate([part.images for part in parts]))
    assert np.array_equal(together.masks, np.concatenate([part.masks for part in parts]))


def test_rows_of_a_shard_are_the_bytes_that_they_have_always_been() -> None:
    digest = hashlib.sha256()
    for renderer, seed, shard, count in (
        (Tetrominoes(), 0, 0, 300),
        (Tetrominoes((2, 4), 7, 2), 11, 5, 100),
        (Tetrominoes((1, 3), 9, 3), 2**63, 10**6, 50),
    ):
        scenes = renderer.render(seed, shard, count)
        factors = [scenes.factors[name] for name in sorted(scenes.factors)]
        for values in (scenes.images, scenes.masks, scenes.num_objects, *factors):
            digest.update(values.tobytes())
            digest.update(str(values.dtype).encode())
    # Taken when sets were first rendered; shards that lie on disks, and the recipes' digests, rely on it.
    assert digest.hexdigest() == "63f13cf7eebfccc3debec7b8beb520b88a98da644724e29790bc96ec47e803a3"


def test_rows_shards_and_seeds_differ() -> None:
    renderer = Tetrominoes()
    images = [renderer.render(seed, shard, 20).images for seed in (0, 1) for shard in (0, 1)]
    flat = np.concatenate(images).reshape(80, -1)
    assert len(np.unique(flat, axis=0)) == 80


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pieces": (3, 2)}, "pieces"),
        ({"pieces": (0, 2)}, "pieces"),
        ({"pieces": (13, 13)}, "pieces: 13 .* grid: 7"),
        ({"grid": 3}, "grid: 3"),
        ({"cell": 0}, "cell: 0"),
    ],
)
def test_impossible_scenes_are_refused(fields: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        Tetrominoes(**fields)


def test_a_crowded_grid_says_so() -> None:
    with pytest.raises(ValueError, match=r"pieces: 11 pieces do not always fit grid: 7 .*larger grid"):
        Tetrominoes((11, 11)).render(0, 0, 50)
