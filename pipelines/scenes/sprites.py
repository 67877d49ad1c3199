"""Multi-dSprites: ovals, squares and hearts that occlude each other (multi-object data sets, DeepMind 2019; the sprites
of dSprites, Matthey et al. 2017), rendered by numpy.

Published: 64x64 images, three sets of colours and counts, six scales from 0.5 to 1, 40 orientations of a full turn,
32 x 32 positions, hard edges. What is not published, and chosen here:

* sprites: at scale 1 the square has sides of 18.6 pixels, the oval semi-axes of 12.1 and 7.6, the heart is a square of
  12.4 with a half disc on each of two sides. No two pictures of a sprite are then the same, but for its symmetry.
* positions: centres of mass on the centres of pixels 16 .. 47, so that no sprite is cut by the border.
* orientations: 2 pi k / 40, so that no two are the same turn.
* colours: hue uniform, saturation and value uniform in [0.5, 1]; the grey uniform.
* no sprite is hidden: a scene in which one shows less than `min_pixels` pixels is drawn again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipelines.noise import Purpose, generator
from pipelines.scenes.scenes import Renderer, Scenes, check_range

SHAPES = ("oval", "square", "heart")
SCALES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ORIENTATIONS = 40
POSITIONS = 32
SIDE = 64

OVAL_AXES = (12.1, 7.6)
SQUARE_SIDE = 18.6
HEART_SIDE = 12.4

Coloring = Literal["colored_on_grayscale", "colored_on_colored", "binarized"]
_SPRITES: dict[str, tuple[int, int]] = {
    "colored_on_grayscale": (2, 5),
    "colored_on_colored": (1, 4),
    "binarized": (2, 3),
}

_REACH = 14  # pixels from a sprite's centre to its farthest one, at most
_ATTEMPTS = 1000
# What a sprite takes: shape, scale, orientation, x, y, and three numbers for its colour.
_PER_SPRITE = 8


@dataclass(frozen=True)
class MultiDSprites(Renderer):
    """Renderer of Multi-dSprites scenes. The defaults are the published set `colored_on_grayscale`.

    Fields:
        coloring: which of the published sets: `colored_on_grayscale` (random HSV colours on a random grey),
            `colored_on_colored` (all colours random RGB), `binarized` (white on black: where two sprites overlap, only
            the masks tell them apart).
        sprites: (fewest, most) sprites a scene, uniform in this closed range; null is the published range of the
            colouring: (2, 5), (1, 4), (2, 3).
        min_pixels: each sprite shows at least this many pixels.

    Raises:
        ValueError: a field is out of range.
    """

    coloring: Coloring = "colored_on_grayscale"
    sprites: tuple[int, int] | None = None
    min_pixels: int = 1

    def __post_init__(self) -> None:
        if self.coloring not in get_args(Coloring):
            raise ValueError(f"coloring: {self.coloring!r} is not known; use one of {', '.join(get_args(Coloring))}")
        if self.sprites is not None:
            check_range("sprites", self.sprites, 32)
        smallest = int(_bank()[:, 0].sum(axis=(-1, -2)).min())
        if not 1 <= self.min_pixels <= smallest:
            raise ValueError(f"min_pixels: {self.min_pixels} is not within 1 .. {smallest}, the smallest sprite's area")

    def render_range(self, seed: int, first: int, count: int) -> Scenes:
        """Scenes `first` .. `first + count - 1`. A scene is a function of (seed, its index) and the fields alone.

        The count is uniform. Given that nothing is hidden, all factors are uniform and independent; later sprites lie
        on top of earlier ones.

        Returns:
            `Scenes`; factors [count, most]: `shape` int64 index into SHAPES; `scale`, `orientation` (radians,
            counter-clockwise as seen), `x`, `y` (centre of mass as a fraction of the image's side) float32; `color`
            float32 [count, most, 3], RGB in [0, 1]; `visibility` float32, the part of a sprite that is not occluded,
            above 0.

        Raises:
            ValueError: a scene stays so crowded that a sprite is hidden in 1000 drawings of it.
        """
        fewest, most = self.sprites or _SPRITES[self.coloring]
        width = 4 + most * _PER_SPRITE
        # The count is of the first drawing: drawing again does not favour small ones.
        uniform = _uniform(seed, range(first, first + count), 0, width)  # [N, 4 + M * 8]
        num_objects = fewest + _pick(uniform[:, 0], most - fewest + 1)  # [N]
        masks, area, shown = _layers(uniform, num_objects)
        for attempt in range(1, _ATTEMPTS):
            again = np.flatnonzero(((shown < self.min_pixels) & (area > 0)).any(axis=1))
            if not len(again):
                break
            uniform[again] = _uniform(seed, [first + int(row) for row in again], attempt, width)
            masks[again], area[again], shown[again] = _layers(uniform[again], num_objects[again])
        else:
            raise ValueError(
                f"sprites: {most} sprites hide each other (min_pixels: {self.min_pixels}); lower one of the two"
            )
        (shape, scale, turn, x, y), color = _factors(uniform)
        present = np.arange(most) < num_objects[:, None]  # [N, M]
        palette = np.concatenate([self._backgrounds(uniform[:, 1:4])[:, None], self._colors(color)], axis=1)
        pixels = np.round(255 * palette).astype(np.uint8)  # [N, 1 + M, 3]
        images = np.take_along_axis(pixels, masks.reshape(count, SIDE**2, 1).astype(np.int64), axis=1)
        factors: dict[str, NDArray[Any]] = {
            "shape": shape,
            "scale": np.array(SCALES, dtype=np.float32)[scale],
            "orientation": (2 * math.pi / ORIENTATIONS * turn).astype(np.float32),
            "x": ((_centre(x) + 0.5) / SIDE).astype(np.float32),
            "y": ((_centre(y) + 0.5) / SIDE).astype(np.float32),
            "color": palette[:, 1:].astype(np.float32),
            "visibility": (shown / np.maximum(area, 1)).astype(np.float32),
        }
        for values in factors.values():
            values[~present] = -1
        return Scenes(images.reshape(count, SIDE, SIDE, 3), masks, num_objects, factors)

    def _backgrounds(self, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
        """RGB of the backgrounds. [N, 3] -> [N, 3]."""
        if self.coloring == "binarized":
            return np.zeros_like(uniform)
        return uniform if self.coloring == "colored_on_colored" else uniform[:, :1].repeat(3, axis=1)

    def _colors(self, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
        """RGB of the sprites. [N, M, 3] -> [N, M, 3]."""
        if self.coloring == "binarized":
            return np.ones_like(uniform)
        return uniform if self.coloring == "colored_on_colored" else _rgb(uniform)


def _uniform(seed: int, scenes: Sequence[int], attempt: int, width: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for an attempt at drawing N scenes, [N, width]."""
    rows = [generator(seed, Purpose.SCENES, step=attempt, place=scene).random(width) for scene in scenes]
    return np.array(rows).reshape(len(scenes), width)


def _factors(uniform: NDArray[np.float64]) -> tuple[list[NDArray[np.int64]], NDArray[np.float64]]:
    """Shape, scale, orientation, x and y as indices [N, M], and the numbers for the colours [N, M, 3]."""
    most = (uniform.shape[1] - 4) // _PER_SPRITE
    draws = uniform[:, 4:].reshape(len(uniform), most, _PER_SPRITE)  # [N, M, 8]
    options = (len(SHAPES), len(SCALES), ORIENTATIONS, POSITIONS, POSITIONS)
    indices = [_pick(draws[..., i], option) for i, option in enumerate(options)]
    return indices, draws[..., 5:]


def _layers(
    uniform: NDArray[np.float64], num_objects: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """The sprites laid on each other.

    Returns:
        masks uint8 [N, H, W]; pixels of each whole sprite [N, M], and those that show [N, M]; 0 where there is none.
    """
    (shape, scale, turn, x, y), _ = _factors(uniform)
    count, most = shape.shape
    window = np.arange(-_REACH, _REACH + 1)  # [P]
    masks = np.zeros((count, SIDE, SIDE), dtype=np.uint8)
    area = np.zeros((count, most), dtype=np.int64)
    for i in range(most):
        scenes = np.flatnonzero(num_objects > i)  # [n]
        bitmaps = _bank()[shape[scenes, i], scale[scenes, i], turn[scenes, i]]  # [n, P, P]
        area[scenes, i] = bitmaps.sum(axis=(1, 2))
        n, row, column = np.nonzero(bitmaps)
        rows = _centre(y)[scenes[n], i] + window[row]
        columns = _centre(x)[scenes[n], i] + window[column]
        masks[scenes[n], rows, columns] = i + 1
    ids = masks.reshape(count, SIDE**2) + (most + 1) * np.arange(count)[:, None]  # distinct in each scene
    shown = np.bincount(ids.ravel(), minlength=count * (most + 1)).reshape(count, most + 1)[:, 1:]
    return masks, area, shown


def _centre(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pixel on whose centre a sprite's centre of mass lies."""
    return index + (SIDE - POSITIONS) // 2


@lru_cache(maxsize=1)
def _bank() -> NDArray[np.bool_]:
    """Every sprite at every scale and orientation, bool [3, 6, 40, P, P]: the pixels whose centres it covers."""
    offset = np.arange(-_REACH, _REACH + 1.0)
    right, down = np.meshgrid(offset, offset)  # [P, P], the sprite's centre of mass at 0
    scale = np.array(SCALES)[:, None, None, None]  # [6, 1, 1, 1]
    angle = (2 * math.pi / ORIENTATIONS * np.arange(ORIENTATIONS))[:, None, None]  # [40, 1, 1]
    # Turned back and shrunk back: where each pixel lies in the upright sprite at scale 1, v upwards. [6, 40, P, P]
    u = (np.cos(angle) * right - np.sin(angle) * down) / scale
    v = (-np.sin(angle) * right - np.cos(angle) * down) / scale
    # Edges that run through pixel centres are decided by this margin, not by the last bit of a sine.
    margin = 1e-9
    oval = (u / OVAL_AXES[0]) ** 2 + (v / OVAL_AXES[1]) ** 2 <= 1 - margin
    square = np.maximum(abs(u), abs(v)) <= SQUARE_SIDE / 2 - margin
    return np.stack([oval, square, _heart(u, v, margin)])


def _heart(u: NDArray[np.float64], v: NDArray[np.float64], margin: float) -> NDArray[np.bool_]:
    """A square on its tip, and on its two upper sides half a disc each; its centre of mass at 0."""
    half = HEART_SIDE / 2
    # Each half disc has the area pi half^2 / 2, and its centre of mass half + 4 half / (3 pi) from the square's centre.
    lift = math.pi * half**2 * half * (1 + 4 / (3 * math.pi)) / math.sqrt(2) / (4 * half**2 + math.pi * half**2)
    v = v + lift
    p, q = (v + u) / math.sqrt(2), (v - u) / math.sqrt(2)  # along the square's sides
    square = np.maximum(abs(p), abs(q)) <= half - margin
    discs = np.minimum((p - half) ** 2 + q**2, p**2 + (q - half) ** 2) <= half**2 - margin
    return square | discs


def _rgb(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """RGB of a uniform hue, and saturation and value uniform in [0.5, 1]. [..., 3] -> [..., 3]."""
    hue, saturation, value = uniform[..., 0], 0.5 + uniform[..., 1] / 2, 0.5 + uniform[..., 2] / 2
    # Each channel is a trapezium of the hue, a third of a turn apart (Smith 1978, "Color gamut transform pairs").
    position = (6 * hue[..., None] + np.array([5.0, 3.0, 1.0])) % 6  # [..., 3]
    fall = np.clip(np.minimum(position, 4 - position), 0, 1)
    rgb: NDArray[np.float64] = value[..., None] * (1 - saturation[..., None] * fall)
    return rgb


def _pick(uniform: NDArray[np.float64], options: int) -> NDArray[np.int64]:
    """An index in [0, options) from a uniform number in [0, 1)."""
    return (uniform * options).astype(np.int64)
