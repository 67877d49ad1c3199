"""Pictures of solids by Mitsuba 3 (Jakob et al. 2022), ray traced on the CPU: it needs no OpenGL, display or driver.

Lamps are points, and each sample of a pixel asks one of them. The multi-jittered sampler gives each of four lamps
exactly its share, so that four samples a pixel have no noise but at edges, which they smooth. Shadows are hard, and
metal shows the lamps' highlights and no reflections of its neighbours.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.scenes.geometry import Camera, Solid

# How rough a surface is, and how far it is a metal. Pure metal would be black where no lamp shines back.
_SURFACES: dict[str, dict[str, float]] = {
    "rubber": {"roughness": 0.7, "metallic": 0.0, "specular": 0.3},
    "metal": {"roughness": 0.22, "metallic": 0.6, "specular": 0.9},
}
_FLOOR = 0.55  # grey, and so large that the camera sees no end of it
_FLOOR_HALF = 200.0


@dataclass(frozen=True)
class Lamp:
    """A lamp.

    Fields:
        position: in the world, [3].
        color: linear RGB, relative to white.
        power: what arrives, at a distance of 1 or, from a lamp that is far away, anywhere.
        far: its light comes in parallel from where it is, with the same strength everywhere.
    """

    position: tuple[float, float, float]
    color: tuple[float, float, float]
    power: float
    far: bool = False


@dataclass(frozen=True)
class Surface:
    """What a solid is made of.

    Fields:
        material: `rubber`, dull, or `metal`, with sharp highlights.
        color: linear RGB in [0, 1].
    """

    material: str
    color: tuple[float, float, float]


@contextmanager
def mitsuba() -> Iterator[Any]:
    """Mitsuba, set to the scalar renderer and to one core while the block runs.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import drjit
        import mitsuba as library
    except ImportError as error:
        raise ValueError(
            "3D scenes are rendered by Mitsuba, which is not there or does not load "
            f"({error}); pip install 'slotforge[scenes]'"
        ) from error
    variant, threads = library.variant(), drjit.thread_count()
    library.set_variant("scalar_rgb")
    drjit.set_thread_count(1)  # workers render beside each other, a core each
    try:
        yield library
    finally:
        drjit.set_thread_count(threads)
        if variant is not None:
            library.set_variant(variant)


def shade(
    library: Any,
    camera: Camera,
    lamps: Sequence[Lamp],
    solids: Sequence[Solid],
    surfaces: Sequence[Surface],
    samples: int,
    seed: int,
) -> NDArray[np.uint8]:
    """A picture of solids on a grey floor.

    Args:
        library: what `mitsuba` gives.
        samples: rays a pixel; an even square, with four lamps.
        seed: of where in a pixel the rays go, in [0, 2^32).

    Returns:
        uint8 [H, W, 3], sRGB.
    """
    scene = load(library, camera, lamps, solids, surfaces, samples)
    bitmap = library.Bitmap(library.render(scene, seed=seed))
    return np.array(bitmap.convert(library.Bitmap.PixelFormat.RGB, library.Struct.Type.UInt8, srgb_gamma=True))


def load(
    library: Any,
    camera: Camera,
    lamps: Sequence[Lamp],
    solids: Sequence[Solid],
    surfaces: Sequence[Surface],
    samples: int,
) -> Any:
    """Mitsuba's scene of what `shade` draws; the surfaces of solid i have ids that begin with `solid{i}`."""
    scene: dict[str, Any] = {
        "type": "scene",
        "integrator": {"type": "direct", "emitter_samples": 1, "bsdf_samples": 0},
        "sensor": _sensor(library, camera, samples),
        "floor": {
            "type": "rectangle",
            "to_world": library.ScalarTransform4f().scale(_FLOOR_HALF),
            "surface": {"type": "diffuse", "reflectance": {"type": "rgb", "value": _FLOOR}},
        },
    }
    for number, lamp in enumerate(lamps):
        scene[f"lamp{number}"] = _emitter(lamp)
    for number, (solid, surface) in enumerate(zip(solids, surfaces, strict=True)):
        scene |= _shapes(library, f"solid{number}", solid, surface)
    return library.load_dict(scene, parallel=False, optimize=False)


def _sensor(library: Any, camera: Camera, samples: int) -> dict[str, Any]:
    column, row = camera.centre
    return {
        "type": "perspective",
        "fov": math.degrees(2 * math.atan(camera.width / 2 / camera.focal)),
        "fov_axis": "x",
        "principal_point_offset_x": 0.5 - column / camera.width,
        "principal_point_offset_y": 0.5 - row / camera.height,
        "to_world": library.ScalarTransform4f().look_at(
            origin=list(camera.position), target=[0.0, 0.0, 0.0], up=[0.0, 0.0, 1.0]
        ),
        "film": {
            "type": "hdrfilm",
            "width": camera.width,
            "height": camera.height,
            "rfilter": {"type": "box"},
            "pixel_format": "rgb",
            "component_format": "float32",
        },
        "sampler": {"type": "multijitter", "sample_count": samples},
    }


def _emitter(lamp: Lamp) -> dict[str, Any]:
    light = {"type": "rgb", "value": [lamp.power * channel for channel in lamp.color]}
    if lamp.far:
        return {"type": "directional", "direction": [-x for x in lamp.position], "irradiance": light}
    return {"type": "point", "position": list(lamp.position), "intensity": light}


def _shapes(library: Any, name: str, solid: Solid, surface: Surface) -> dict[str, Any]:
    """The surfaces of a solid; a cylinder has a lid, its base is on the floor."""
    material = {
        "type": "principled",
        "base_color": {"type": "rgb", "value": list(surface.color)},
        **_SURFACES[surface.material],
    }
    x, y, z = solid.centre
    if solid.shape == "sphere":
        return {name: {"type": "sphere", "center": [x, y, z], "radius": solid.half, "surface": material}}
    at = library.ScalarTransform4f().translate([x, y, z])
    if solid.shape == "cube":
        turned = at.rotate([0.0, 0.0, 1.0], solid.rotation).scale(solid.half)
        return {name: {"type": "cube", "to_world": turned, "surface": material}}
    top = z + solid.half
    lid = library.ScalarTransform4f().translate([x, y, top]).scale(solid.half)
    side = {"type": "cylinder", "p0": [x, y, 0.0], "p1": [x, y, top], "radius": solid.half, "surface": material}
    return {name: side, f"{name}-lid": {"type": "disk", "to_world": lid, "surface": material}}
