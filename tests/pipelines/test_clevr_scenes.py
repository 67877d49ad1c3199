"""3D scenes: masks and factors against the rays of Mitsuba and formulas, pictures against the geometry of light."""

import hashlib
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage, stats

from pipelines.scenes import RENDERERS, Clevr, Renderer, Scenes
from pipelines.scenes.clevr import AREA, COLORS, MATERIALS, SHAPES, SIZES, Layout
from pipelines.scenes.geometry import Camera, Solid, cast
from pipelines.scenes.shading import Lamp, Surface, load, mitsuba, shade


@pytest.fixture(scope="module")
def layouts() -> list[Layout]:
    return [Clevr().layout(1, index) for index in range(150)]


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Clevr().render_range(1, 0, 16)


# --- geometry ----------------------------------------------------------------------------------------------------


def seen_by_mitsuba(camera: Camera, solids: list[Solid]) -> NDArray[np.int64]:
    """Which solid the centre of each pixel sees; 0 is the floor, -1 nothing."""
    ids = np.zeros((camera.height, camera.width), dtype=np.int64)
    surfaces = [Surface("rubber", (0.5, 0.5, 0.5))] * len(solids)
    with mitsuba() as library:
        scene = load(library, camera, [Lamp((0, 0, 9), (1, 1, 1), 1)], solids, surfaces, 4)
        sensor = scene.sensors()[0]
        for row in range(camera.height):
            for column in range(camera.width):
                film = [(column + 0.5) / camera.width, (row + 0.5) / camera.height]
                hit = scene.ray_intersect(sensor.sample_ray(0.0, 0.5, film, [0.5, 0.5])[0])
                name = hit.shape.id() if hit.is_valid() else "solid-1"
                if name != "floor":
                    ids[row, column] = 1 + int(name.removeprefix("solid").removesuffix("-lid"))
    return ids


@pytest.mark.parametrize("clevr", [Clevr(), Clevr(size=96, crop=False), Clevr((10, 10), size=64)])
def test_masks_are_what_the_rays_of_mitsuba_see(clevr: Clevr) -> None:
    shapes = set()
    for index in range(3):
        layout = clevr.layout(2, index)
        shapes |= {solid.shape for solid in layout.solids}
        rays = seen_by_mitsuba(layout.camera, layout.solids)
        # A pixel centre that lies within rounding of an edge may go to either side.
        assert (rays != layout.ids).sum() <= 1
    assert len(shapes) == 3


def test_any_camera_sees_what_mitsuba_sees() -> None:
    layout = Clevr().layout(2, 0)
    for camera in (
        Camera((6.0, -5.0, 4.0), 50, 70, 80.0, (20.0, 33.0)),
        Camera((-2.0, 7.0, 1.0), 64, 40, 45.0, (30.0, 20.0)),
    ):
        assert (seen_by_mitsuba(camera, layout.solids) != cast(camera, layout.solids)[0]).sum() <= 1


def test_what_an_object_would_cover_alone_is_what_mitsuba_sees_of_it_alone(layouts: list[Layout]) -> None:
    layout = next(layout for layout in layouts if (layout.area > layout.shown() + 50).any())
    for solid, area in zip(layout.solids, layout.area, strict=True):
        assert abs((seen_by_mitsuba(layout.camera, [solid]) == 1).sum() - area) <= 1


def test_a_sphere_covers_the_ellipse_of_its_cone() -> None:
    camera = Clevr(size=480, crop=False).layout(3, 0).camera
    _, _, forward = camera.axes
    for centre in ((0.0, 0.0, 0.7), (1.5, -2.0, 0.7), (-2.5, 1.0, 0.7)):
        # A cone of half angle a whose axis is tilted by t against the optical axis cuts the picture in an ellipse.
        to = np.array(centre) - np.array(camera.position)
        a = math.asin(0.7 / np.linalg.norm(to))
        t = math.acos(to @ forward / np.linalg.norm(to))
        spread = math.cos(t) ** 2 - math.sin(a) ** 2
        ellipse = math.pi * camera.focal**2 * math.sin(a) ** 2 * math.cos(a) / spread**1.5
        _, area = cast(camera, [Solid("sphere", centre, 0.7, 0.0)])
        assert area[0] == pytest.approx(ellipse, rel=0.01)


# --- layout ------------------------------------------------------------------------------------------------------


def test_no_two_objects_touch_and_all_keep_their_distance(layouts: list[Layout]) -> None:
    for layout in layouts:
        radius = np.array(list(SIZES.values()))[layout.size]
        for solid, reach in zip(layout.solids, radius, strict=True):
            corners = solid.corners()
            assert corners[:, 2].min() == pytest.approx(0)  # it stands on the floor
            assert np.abs(solid.centre[:2]).max() <= AREA
            # A cube's corners lie on the circle that is kept clear for it; the others fill it.
            footprint = np.linalg.norm(corners[:, :2] - solid.centre[:2], axis=1).max()
            assert footprint == pytest.approx(reach * (1 if solid.shape == "cube" else math.sqrt(2)))
            assert solid.half == pytest.approx(reach / (math.sqrt(2) if solid.shape == "cube" else 1))
        x, y, _ = np.array(layout.camera.position)
        view = np.array([-x, -y]) / math.hypot(x, y)
        for i in range(len(radius)):
            for j in range(i):
                apart = np.array(layout.solids[i].centre[:2]) - layout.solids[j].centre[:2]
                assert np.linalg.norm(apart) >= radius[i] + radius[j] + 0.25
                assert abs(apart @ view) >= 0.4 and abs(apart @ [-view[1], view[0]]) >= 0.4


def test_each_object_shows_enough_pixels(layouts: list[Layout]) -> None:
    assert min(layout.shown().min() for layout in layouts) >= 200 * (128 / 192) ** 2 - 0.5
    whole = [Clevr(size=240, crop=False).layout(4, index).shown().min() for index in range(20)]
    assert min(whole) >= 200
    any_part = [Clevr((10, 10), min_pixels=1).layout(4, index).shown().min() for index in range(40)]
    assert 1 <= min(any_part) < 80  # or nothing was asked for


def test_counts_and_what_does_not_bear_on_visibility_are_uniform(layouts: list[Layout]) -> None:
    counts = np.bincount([len(layout.solids) for layout in layouts], minlength=11)
    assert not counts[:3].any() and len(counts) == 11
    assert stats.chisquare(counts[3:]).pvalue > 1e-3
    color = np.concatenate([layout.color for layout in layouts])
    material = np.concatenate([layout.material for layout in layouts])
    rotation = np.array([solid.rotation for layout in layouts for solid in layout.solids])
    assert stats.chisquare(np.bincount(color, minlength=len(COLORS))).pvalue > 1e-3
    assert stats.chisquare(np.bincount(material, minlength=len(MATERIALS))).pvalue > 1e-3
    assert stats.kstest(rotation / 360, "uniform").pvalue > 1e-3
    table = np.zeros((len(COLORS), len(MATERIALS)))
    np.add.at(table, (color, material), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_sizes_and_shapes_are_uniform_where_nothing_is_refused() -> None:
    layouts = [Clevr((1, 1), size=48, crop=False, min_pixels=1).layout(5, index) for index in range(600)]
    shape = np.concatenate([layout.shape for layout in layouts])
    size = np.concatenate([layout.size for layout in layouts])
    assert stats.chisquare(np.bincount(shape, minlength=len(SHAPES))).pvalue > 1e-3
    assert stats.chisquare(np.bincount(size, minlength=len(SIZES))).pvalue > 1e-3
    camera = np.array([layout.camera.position for layout in layouts]) - (7.48113, -6.50764, 5.34367)
    key = np.array([layout.lamps[0].position for layout in layouts]) - (6.44671, -2.90517, 4.2584)
    for uniform in (*(camera + 0.5).T, *((key + 1) / 2).T):
        assert stats.kstest(uniform, "uniform").pvalue > 1e-3


# --- scenes ------------------------------------------------------------------------------------------------------


def test_factors_are_padded_and_say_what_the_masks_show(scenes: Scenes) -> None:
    assert scenes.images.shape == (16, 128, 128, 3) and scenes.images.dtype == np.uint8
    assert scenes.masks.shape == (16, 128, 128) and scenes.masks.dtype == np.uint8
    present = np.arange(10) < scenes.num_objects[:, None]
    for values in scenes.factors.values():
        assert values.shape[:2] == (16, 10) and (values[~present] == -1).all()
    unoccluded = 0
    for row in range(16):
        assert set(np.unique(scenes.masks[row])) == set(range(scenes.num_objects[row] + 1))
        depth = scenes.factors["pixel_coords"][row, :, 2]
        for i in range(scenes.num_objects[row]):
            column, line, _ = scenes.factors["pixel_coords"][row, i]
            at = scenes.masks[row, int(line), int(column)]
            if scenes.factors["visibility"][row, i] == 1:
                unoccluded += 1
                assert at == i + 1
            else:  # what covers a centre is nearer
                assert at == i + 1 or depth[at - 1] < depth[i] + 0.7
    assert unoccluded > 30
    assert 0 < scenes.factors["visibility"][present].min() < 0.9 < scenes.factors["visibility"][present].max() == 1
    heights = np.unique(scenes.factors["z"][present])
    assert heights == pytest.approx(np.array([0.35 / math.sqrt(2), 0.35, 0.7 / math.sqrt(2), 0.7]))


def test_rubber_has_the_colour_that_the_factors_say(scenes: Scenes) -> None:
    palette = np.array(list(COLORS.values())) / 255
    palette /= np.linalg.norm(palette, axis=1, keepdims=True)
    right = wrong = 0
    for row in range(16):
        for i in range(scenes.num_objects[row]):
            inside = ndimage.binary_erosion(scenes.masks[row] == i + 1, iterations=2)
            if inside.sum() < 20 or MATERIALS[scenes.factors["material"][row, i]] != "rubber":
                continue
            light = (scenes.images[row][inside] / 255) ** 2.2  # about linear
            mean = light.mean(axis=0)
            found = (palette @ (mean / np.linalg.norm(mean))).argmax()
            right, wrong = right + (found == scenes.factors["color"][row, i]), wrong + 1
    assert wrong > 25 and right >= 0.95 * wrong


def test_the_floor_is_grey(scenes: Scenes) -> None:
    for image, masks in zip(scenes.images, scenes.masks, strict=True):
        floor = image[ndimage.binary_erosion(masks == 0, iterations=2)].astype(int)
        assert (floor.max(axis=1) - floor.min(axis=1)).max() < 45
        assert 50 < np.median(floor) < 220


def test_floor_is_dark_where_an_object_stands_before_the_lamp() -> None:
    shadows = lights = 0
    for index in range(4):
        layout = Clevr((5, 10)).layout(1, index)
        camera, solids = layout.camera, layout.solids
        lamp = replace(layout.lamps[0], power=60.0)
        with mitsuba() as library:
            image = shade(library, camera, [lamp], solids, layout.surfaces(), 4, seed=0)
        # Where each pixel's ray meets z = 0, and whether the way from there to the lamp is free.
        rays = camera.rays()
        floor = np.array(camera.position) - rays * (camera.position[2] / rays[..., 2:])
        way = floor - np.array(lamp.position)
        blocked = np.any([solid.distance(np.array(lamp.position), way) < 1 for solid in solids], axis=0)
        ground = ndimage.binary_erosion(layout.ids == 0, iterations=2)
        shadow = ground & ndimage.binary_erosion(blocked, iterations=2)
        lit = ground & ~ndimage.binary_dilation(blocked, iterations=2)
        assert not image[shadow].any()
        assert image[lit].min() > 10
        shadows, lights = shadows + shadow.sum(), lights + lit.sum()
    assert shadows > 200 and lights > 10_000


def test_metal_shines_and_rubber_is_dull() -> None:
    layout = Clevr().layout(1, 0)
    sphere = [Solid("sphere", (0.0, 0.0, 0.7), 0.7, 0.0)]
    ids, _ = cast(layout.camera, sphere)
    highlight = {}
    with mitsuba() as library:
        for material in MATERIALS:
            surface = [Surface(material, (0.16, 0.29, 0.84))]
            image = shade(library, layout.camera, layout.lamps, sphere, surface, 16, seed=0)
            red = image[ids == 1][:, 0].astype(float)
            highlight[material] = np.percentile(red, 99) / np.median(red)
    assert highlight["metal"] > 1.5 * highlight["rubber"]


def test_four_samples_have_no_noise_but_at_edges() -> None:
    layout = Clevr().layout(1, 1)
    parts = layout.camera, layout.lamps, layout.solids, layout.surfaces()
    with mitsuba() as library:
        one, other = (shade(library, *parts, 4, seed=seed).astype(int) for seed in (0, 1))
        smooth = shade(library, *parts, 64, seed=2).astype(int)
    assert (one != other).any()
    for picture in (other, smooth):
        assert (abs(one - picture).max(axis=-1) > 4).mean() < 0.1


# --- a function of seed and index --------------------------------------------------------------------------------


def same(one: Scenes, other: Scenes) -> bool:
    return (
        np.array_equal(one.images, other.images)
        and np.array_equal(one.masks, other.masks)
        and np.array_equal(one.num_objects, other.num_objects)
        and all(np.array_equal(values, other.factors[name]) for name, values in one.factors.items())
    )


def part(scenes: Scenes, rows: slice) -> Scenes:
    factors = {name: values[rows] for name, values in scenes.factors.items()}
    return Scenes(scenes.images[rows], scenes.masks[rows], scenes.num_objects[rows], factors)


@pytest.mark.parametrize("name", RENDERERS)
def test_a_scene_does_not_depend_on_what_is_rendered_with_it(name: str) -> None:
    renderer: Renderer = RENDERERS[name]
    together = renderer.render_range(7, 2**40, 5)
    for first, count in ((0, 0), (0, 2), (2, 1), (3, 2)):
        assert same(renderer.render_range(7, 2**40 + first, count), part(together, slice(first, first + count)))
    assert len(np.unique(together.images.reshape(5, -1), axis=0)) == 5
    assert not same(renderer.render_range(8, 2**40, 5), together)
    rows = renderer.render(7, 3, 2)
    assert same(part(renderer.render(7, 3, 3), slice(2)), rows)
    assert not same(renderer.render(7, 4, 2), rows)


def test_another_process_renders_the_same_bytes(scenes: Scenes) -> None:
    program = (
        "import hashlib; from pipelines.scenes import Clevr; scenes = Clevr().render_range(1, 3, 2);"
        "print(hashlib.sha256(scenes.images.tobytes() + scenes.masks.tobytes()).hexdigest())"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    expected = scenes.images[3:5].tobytes() + scenes.masks[3:5].tobytes()
    assert found == hashlib.sha256(expected).hexdigest()


def test_mitsuba_is_left_as_it_was() -> None:
    import drjit
    import mitsuba as library

    threads = drjit.thread_count()
    library.set_variant("scalar_spectral")
    Clevr(size=16).render_range(0, 0, 1)
    assert library.variant() == "scalar_spectral" and drjit.thread_count() == threads


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objects": (3, 11)}, r"objects: \(3, 11\) .* within 1 \.\. 10"),
        ({"objects": (0, 3)}, r"objects: \(0, 3\)"),
        ({"size": 8}, "size: 8 pixels"),
        ({"size": 128, "crop": False}, "size: 128 rows .* multiple of 3"),
        ({"samples": 8}, "samples: 8 rays .* use 4, 16, 36 or 64"),
        ({"min_pixels": 0}, "min_pixels: 0"),
        ({"min_pixels": 1000}, "min_pixels: 1000"),
    ],
)
def test_impossible_parameters_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clevr(**fields)


def test_without_mitsuba_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    with pytest.raises(ValueError, match=r"Mitsuba.*pip install 'slotforge\[scenes\]'"):
        Clevr().render_range(0, 0, 1)
