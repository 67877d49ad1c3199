"""Spheres, cubes and cylinders on a floor seen by a pinhole camera: exact label maps, by casting a ray per pixel.

It does not shade. It says which object a pixel's centre sees, so that masks, visibility and what is drawn again need no
renderer.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks at the origin, upright (z is up).

    Fields:
        position: in the world, [3].
        height, width: of the picture, in pixels.
        focal: focal length in pixels.
        centre: (column, row) of the optical axis in pixels; pixel (0, 0) covers [0, 1) x [0, 1).
    """

    position: tuple[float, float, float]
    height: int
    width: int
    focal: float
    centre: tuple[float, float]

    @cached_property
    def axes(self) -> Vector:
        """Unit vectors to the right, down and forward, as rows [3, 3]."""
        forward = -np.array(self.position)
        forward = forward / np.linalg.norm(forward)
        right = np.array([forward[1], -forward[0], 0.0])  # forward x up
        right = right / np.linalg.norm(right)
        return np.stack([right, np.cross(forward, right), forward])

    def project(self, points: Vector) -> Vector:
        """Points of the world in the picture: column, row, and distance along the optical axis. [..., 3] -> same."""
        seen = (points - np.array(self.position)) @ self.axes.T  # [..., (right, down, forward)]
        pixels = seen[..., :2] / seen[..., 2:] * self.focal + np.array(self.centre)
        return np.concatenate([pixels, seen[..., 2:]], axis=-1)

    def rays(self) -> Vector:
        """Directions through the pixels' centres, of length 1 along the optical axis, [H, W, 3]."""
        column = (np.arange(self.width) + 0.5 - self.centre[0]) / self.focal  # [W]
        row = (np.arange(self.height) + 0.5 - self.centre[1]) / self.focal  # [H]
        right, down, forward = self.axes
        directions: Vector = column[None, :, None] * right + row[:, None, None] * down + forward
        return directions


@dataclass(frozen=True)
class Solid:
    """A body that stands on the floor z = 0.

    Fields:
        shape: a cube stands on a face, a cylinder on its base and is as high as wide.
        centre: of mass, [3].
        half: half the height; also the radius of a sphere or cylinder.
        rotation: degrees about the vertical.
    """

    shape: Literal["sphere", "cube", "cylinder"]
    centre: tuple[float, float, float]
    half: float
    rotation: float

    def corners(self) -> Vector:
        """The corners of the upright box around it, turned with it, [8, 3]."""
        signs = np.stack(np.meshgrid([-1.0, 1.0], [-1.0, 1.0], [-1.0, 1.0]), axis=-1).reshape(8, 3)
        return np.array(self.centre) + self.half * signs @ self._turn().T

    def distance(self, origin: Vector, directions: Vector) -> Vector:
        """How far along each ray it is met, in lengths of the direction; inf where it is missed.

        Args:
            origin: outside of the body, [3].
            directions: [..., 3].

        Returns:
            float64 [...].
        """
        turn = self._turn()
        o = (origin - np.array(self.centre)) @ turn / self.half  # in its own frame, where its half height is 1
        d = directions @ turn / self.half
        if self.shape == "sphere":
            near, far = _round(o, d)
        elif self.shape == "cube":
            near, far = _between(_slabs(o[0], d[..., 0]), _slabs(o[1], d[..., 1]), _slabs(o[2], d[..., 2]))
        else:
            near, far = _between(_round(o[:2], d[..., :2]), _slabs(o[2], d[..., 2]))
        return np.where((near <= far) & (near > 0), near, np.inf)

    def _turn(self) -> Vector:
        """Its axes in the world as columns, [3, 3]."""
        angle = math.radians(self.rotation)
        cos, sin = math.cos(angle), math.sin(angle)
        return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def cast(camera: Camera, solids: list[Solid]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """What the centre of each pixel sees.

    Returns:
        ids uint8 [H, W]: 0 is the background, i is the i-th solid; pixels that each solid would cover alone, int64 [S].
    """
    rays, origin = camera.rays(), np.array(camera.position)
    nearest = np.full((camera.height, camera.width), np.inf)
    ids = np.zeros((camera.height, camera.width), dtype=np.uint8)
    area = np.zeros(len(solids), dtype=np.int64)
    for i, solid in enumerate(solids):
        outline = camera.project(solid.corners())[:, :2]  # its picture lies within the box's
        left, top = np.maximum(np.floor(outline.min(axis=0)), 0).astype(int)
        right, bottom = np.maximum(np.ceil(outline.max(axis=0)), 0).astype(int)
        window = np.s_[top:bottom, left:right]
        distance = solid.distance(origin, rays[window])
        area[i] = np.isfinite(distance).sum()
        closer = distance < nearest[window]
        nearest[window] = np.where(closer, distance, nearest[window])
        ids[window] = np.where(closer, np.uint8(i + 1), ids[window])
    return ids, area


def _slabs(origin: float, direction: Vector) -> tuple[Vector, Vector]:
    """Where rays enter and leave |x| <= 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (-1 - origin) / direction, (1 - origin) / direction
    return np.minimum(one, other), np.maximum(one, other)


def _round(origin: Vector, directions: Vector) -> tuple[Vector, Vector]:
    """Where rays enter and leave the unit sphere, or with two coordinates the endless cylinder; inf, -inf: nowhere."""
    a = (directions**2).sum(axis=-1)
    b = (directions * origin).sum(axis=-1)
    c = (origin**2).sum() - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt(b**2 - a * c)
        near, far = (-b - root) / a, (-b + root) / a
    missed = np.isnan(root)
    return np.where(missed, np.inf, near), np.where(missed, -np.inf, far)


def _between(*spans: tuple[Vector, Vector]) -> tuple[Vector, Vector]:
    """Where rays are inside of all."""
    near, far = spans[0]
    for entered, left in spans[1:]:
        near, far = np.maximum(near, entered), np.minimum(far, left)
    return near, far
