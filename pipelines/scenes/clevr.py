"""3D scenes in the manner of CLEVR (Johnson et al. 2017): solids of two sizes and two materials on a floor, with
shadows and occlusion. Mitsuba draws them; masks and factors are exact and need no renderer.

As published: 3 to 10 objects; sizes 0.7 and 0.35; eight colours; positions within 3 of the origin on each side; at
least 0.25 between objects, and 0.4 between their centres along and across the camera's view; at least 200 of 320x240
pixels visible; camera and lamps at CLEVR's places, moved by up to 0.5 and 1; and the crop that its users train on.

Not as published: a cube's half side is its size / sqrt 2, so that no two objects touch whatever their turn (CLEVR's own
code means to do this); edges are sharp, not bevelled; lamps are points, so that shadows are hard, and metal does not
mirror its neighbours; the camera turns to the origin after it has moved; an object's centre is in view, also of the
crop, which leaves less room and so more occlusion.

Almost all the time goes into Mitsuba's rays, about 0.6 microseconds for each sample with its shadow: at 128x128 with
four samples a pixel a core draws some 20 scenes a second, at 64x64 some 60. A hundred would take a rasteriser, whose
shadows are guesses, or Mitsuba's vectorised renderer, which needs LLVM's library on the machine.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.noise import Purpose, generator
from pipelines.scenes.geometry import Camera, Solid, cast
from pipelines.scenes.scenes import Renderer, Scenes, check_range
from pipelines.scenes.shading import Lamp, Surface, mitsuba, shade

SHAPES: tuple[Literal["sphere", "cube", "cylinder"], ...] = ("sphere", "cube", "cylinder")
SIZES = {"small": 0.35, "large": 0.7}
MATERIALS = ("rubber", "metal")
COLORS: dict[str, tuple[int, int, int]] = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}

AREA = 3.0  # objects lie within this of the origin, in x and in y
GAP = 0.25
MARGIN = 0.4
_CAMERA, _CAMERA_JITTER = (7.48113, -6.50764, 5.34367), 0.5
_LAMP_JITTER = 1.0
_KEY = Lamp((6.44671, -2.90517, 4.2584), (1.0, 0.93, 0.82), 34.0)
_FILL = Lamp((-4.67112, -4.0136, 3.01122), (0.82, 0.88, 1.0), 11.0)
_BACK = Lamp((-1.1685, 2.64602, 5.81574), (1.0, 1.0, 1.0), 14.0)
_SUN = Lamp((11.6608, -6.62799, 25.8232), (1.0, 1.0, 1.0), 1.1, far=True)

# A picture of CLEVR: a lens of 35 mm before a sensor of 32 mm, and the square that is cut out of it.
_HEIGHT, _WIDTH, _FOCAL = 240, 320, 350.0
_CROP_TOP, _CROP_LEFT, _CROP_SIDE = 29, 64, 192

_TRIES = 500  # at placing an object, before all are placed anew
_ATTEMPTS = 1000


@dataclass(frozen=True)
class Layout:
    """A scene before it is drawn.

    Fields:
        camera, lamps: where it is seen and lit from.
        solids: its objects, [S].
        shape, size, material, color: indices into SHAPES, SIZES, MATERIALS and COLORS, int64 [S] each.
        ids: uint8 [H, W], which object each pixel's centre sees; 0 is the floor.
        area: pixels that each object would cover alone, int64 [S].
    """

    camera: Camera
    lamps: tuple[Lamp, ...]
    solids: list[Solid]
    shape: NDArray[np.int64]
    size: NDArray[np.int64]
    material: NDArray[np.int64]
    color: NDArray[np.int64]
    ids: NDArray[np.uint8]
    area: NDArray[np.int64]

    def shown(self) -> NDArray[np.int64]:
        """Pixels of each object that are not occluded, [S]."""
        return np.bincount(self.ids.ravel(), minlength=len(self.solids) + 1)[1:]

    def surfaces(self) -> list[Surface]:
        """What the objects are made of."""
        return [
            Surface(MATERIALS[material], _reflectance(color))
            for material, color in zip(self.material, self.color, strict=True)
        ]


@dataclass(frozen=True)
class Clevr(Renderer):
    """Renderer of scenes in the manner of CLEVR. The defaults are what slot attention trains on.

    Fields:
        objects: (fewest, most) objects a scene, uniform in this closed range.
        size: pixels a side of the square picture; without the crop, its height.
        crop: cut the square out of the middle that the published models train on (192 of 240 rows and 320 columns,
            drawn at `size`); false draws the whole picture, 4 / 3 as wide as high.
        samples: rays a pixel, 4, 16, 36 or 64: time grows in proportion, edges become smoother.
        min_pixels: each object shows at least this many pixels of a picture 240 high, and in one that is drawn at
            another scale as many as that makes.

    Raises:
        ValueError: a field is out of range.
    """

    objects: tuple[int, int] = (3, 10)
    size: int = 128
    crop: bool = True
    samples: int = 4
    min_pixels: int = 200

    def __post_init__(self) -> None:
        check_range("objects", self.objects, 10)
        if not 16 <= self.size <= 2048:
            raise ValueError(f"size: {self.size} pixels are not within 16 .. 2048; use one of 64, 128, 240")
        if not self.crop and self.size % 3:
            raise ValueError(f"size: {self.size} rows are not 3 / 4 of a whole number of columns; use a multiple of 3")
        if self.samples not in (4, 16, 36, 64):
            raise ValueError(f"samples: {self.samples} rays cannot be dealt out to four lamps; use 4, 16, 36 or 64")
        if not 1 <= self.min_pixels <= 300:
            raise ValueError(f"min_pixels: {self.min_pixels} is not within 1 .. 300, what small objects can show")

    def render_range(self, seed: int, first: int, count: int) -> Scenes:
        """Scenes `first` .. `first + count - 1`. A scene is a function of (seed, its index) and the fields alone.

        Returns:
            `Scenes`; factors [count, most]: `shape`, `size`, `material`, `color` int64, indices into SHAPES, SIZES,
            MATERIALS and COLORS; `x`, `y`, `z` float32, the centre in the world; `rotation` float32, degrees about the
            vertical; `pixel_coords` float32 [count, most, 3], the centre's column and row in the picture, and its
            distance along the optical axis; `visibility` float32, the part of an object's pixels that is not
            occluded, above 0.

        Raises:
            ValueError: Mitsuba is not installed, or no scene was found in which all objects show enough.
        """
        most = self.objects[1]
        template = self._camera(_CAMERA)
        images = np.empty((count, template.height, template.width, 3), dtype=np.uint8)
        masks = np.empty((count, template.height, template.width), dtype=np.uint8)
        num_objects = np.empty(count, dtype=np.int64)
        indices, numbers = ("shape", "size", "material", "color"), ("x", "y", "z", "rotation", "visibility")
        factors: dict[str, NDArray[Any]] = {
            **{name: np.full((count, most), -1, dtype=np.int64) for name in indices},
            **{name: np.full((count, most), -1, dtype=np.float32) for name in numbers},
            "pixel_coords": np.full((count, most, 3), -1, dtype=np.float32),
        }
        with mitsuba() as library:
            for row in range(count):
                layout = self.layout(seed, first + row)
                parts = layout.camera, layout.lamps, layout.solids, layout.surfaces()
                images[row] = shade(library, *parts, self.samples, seed=(first + row) % 2**32)
                masks[row], num_objects[row] = layout.ids, len(layout.solids)
                for name, values in _factors(layout).items():
                    factors[name][row, : len(layout.solids)] = values
        return Scenes(images, masks, num_objects, factors)

    def layout(self, seed: int, index: int) -> Layout:
        """Where everything is in a scene; what `render_range` draws. It takes no renderer.

        Raises:
            ValueError: no scene was found in which all objects show enough.
        """
        fewest, most = self.objects
        # The count is of the first attempt: trying again does not favour small ones.
        count = int(generator(seed, Purpose.SCENES, place=index).integers(fewest, most + 1))
        needed = max(1, round(self.min_pixels * (self._camera(_CAMERA).focal / _FOCAL) ** 2))
        for attempt in range(1, _ATTEMPTS + 1):
            layout = self._attempt(generator(seed, Purpose.SCENES, step=attempt, place=index), count)
            if layout is not None and (layout.shown() >= needed).all():
                return layout
        raise ValueError(
            f"objects: {count} do not all show {needed} pixels in {_ATTEMPTS} attempts; use fewer objects or lower "
            f"min_pixels: {self.min_pixels}"
        )

    def _attempt(self, random: np.random.Generator, count: int) -> Layout | None:
        """Objects that do not touch each other, seen or not; None where one finds no place."""
        camera = self._camera(_moved(random, _CAMERA, _CAMERA_JITTER))
        lamps = tuple(
            Lamp(_moved(random, lamp.position, _LAMP_JITTER), lamp.color, lamp.power) for lamp in (_KEY, _FILL, _BACK)
        )
        shape, size = random.integers(len(SHAPES), size=count), random.integers(len(SIZES), size=count)
        material, color = random.integers(len(MATERIALS), size=count), random.integers(len(COLORS), size=count)
        rotation = 360 * random.random(count)
        radius = np.array(list(SIZES.values()))[size]  # of the circle on the floor that holds it, whatever its turn
        half = np.where(shape == SHAPES.index("cube"), radius / math.sqrt(2), radius)
        places = _places(random, camera, radius, half)
        if places is None:
            return None
        solids = [
            Solid(SHAPES[shape[i]], (float(places[i, 0]), float(places[i, 1]), float(half[i])), float(half[i]), turn)
            for i, turn in enumerate(rotation.tolist())
        ]
        ids, area = cast(camera, solids)
        return Layout(camera, (*lamps, _SUN), solids, shape, size, material, color, ids, area)

    def _camera(self, position: tuple[float, float, float]) -> Camera:
        if self.crop:
            zoom = self.size / _CROP_SIDE
            centre = ((_WIDTH / 2 - _CROP_LEFT) * zoom, (_HEIGHT / 2 - _CROP_TOP) * zoom)
            return Camera(position, self.size, self.size, _FOCAL * zoom, centre)
        zoom = self.size / _HEIGHT
        width = self.size * _WIDTH // _HEIGHT
        return Camera(position, self.size, width, _FOCAL * zoom, (width / 2, self.size / 2))


def _places(
    random: np.random.Generator, camera: Camera, radius: NDArray[np.float64], half: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Places on the floor for objects of these radii, [S, 2]; None where one finds none in 500 tries."""
    right, _, forward = camera.axes
    ahead = forward[:2] / np.linalg.norm(forward[:2])
    directions = np.stack([right[:2], ahead], axis=1)  # [2, (across, along)] the camera's view
    count = len(radius)
    tries = random.uniform(-AREA, AREA, size=(count, _TRIES, 2))  # [S, T, 2]
    middle = np.concatenate([tries, half[:, None, None].repeat(_TRIES, axis=1)], axis=-1)  # [S, T, 3]
    pixel = camera.project(middle)[..., :2]
    inside = (pixel >= 0) & (pixel < (camera.width, camera.height))
    good: NDArray[np.bool_] = np.all(inside, axis=-1)  # [S, T], in view
    places = np.empty((count, 2))
    for i in range(count):
        found = np.flatnonzero(good[i])
        if not len(found):
            return None
        places[i] = tries[i, found[0]]
        apart = tries[i + 1 :] - places[i]  # [S - i - 1, T, 2]
        far = (apart**2).sum(axis=-1) >= ((radius[i + 1 :] + radius[i] + GAP) ** 2)[:, None]
        good[i + 1 :] &= far & (abs(apart @ directions) >= MARGIN).all(axis=-1)
    return places


def _moved(
    random: np.random.Generator, position: tuple[float, float, float], jitter: float
) -> tuple[float, float, float]:
    x, y, z = (np.array(position) + random.uniform(-jitter, jitter, size=3)).tolist()
    return x, y, z


def _reflectance(color: int) -> tuple[float, float, float]:
    """CLEVR hands its 8-bit colours to Blender as linear reflectances."""
    red, green, blue = (channel / 255 for channel in list(COLORS.values())[color])
    return red, green, blue


def _factors(layout: Layout) -> dict[str, NDArray[Any]]:
    """What `render_range` returns as factors, for the objects of one scene."""
    centres = np.array([solid.centre for solid in layout.solids])  # [S, 3]
    return {
        "shape": layout.shape,
        "size": layout.size,
        "material": layout.material,
        "color": layout.color,
        "x": centres[:, 0],
        "y": centres[:, 1],
        "z": centres[:, 2],
        "rotation": np.array([solid.rotation for solid in layout.solids]),
        "pixel_coords": layout.camera.project(centres),
        "visibility": layout.shown() / layout.area,
    }
