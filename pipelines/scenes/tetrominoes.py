"""Tetrominoes: coloured four-cell pieces on black (multi-object data sets, DeepMind 2019), rendered by numpy.

The published set has 35x35 images, three pieces a scene, no overlap (touching is allowed), six colours and 17 shapes.
There are 19 fixed tetrominoes; which 17 were used is not published. Ours leaves out the two orientations of Z, so
that all seventeen have their extents in common with another shape and S stands for both mirror images.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.noise import Purpose, generator
from pipelines.scenes.scenes import Renderer, Scenes, check_range

SHAPES: dict[str, tuple[str, ...]] = {
    "I0": ("####",),
    "I1": ("#", "#", "#", "#"),
    "O": ("##", "##"),
    "T0": ("###", ".#."),
    "T1": (".#", "##", ".#"),
    "T2": (".#.", "###"),
    "T3": ("#.", "##", "#."),
    "S0": (".##", "##."),
    "S1": ("#.", "##", ".#"),
    "J0": ("#..", "###"),
    "J1": ("##", "#.", "#."),
    "J2": ("###", "..#"),
    "J3": (".#", ".#", "##"),
    "L0": ("..#", "###"),
    "L1": ("#.", "#.", "##"),
    "L2": ("###", "#.."),
    "L3": ("##", ".#", ".#"),
}
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
}


@dataclass(frozen=True)
class Tetrominoes(Renderer):
    """Renderer of Tetrominoes scenes. The defaults are the published set.

    Fields:
        pieces: (fewest, most) pieces a scene; counts are uniform in this closed range.
        grid: cells a side. Pieces lie on cells.
        cell: pixels a side of a cell; the image is [grid * cell, grid * cell].

    Raises:
        ValueError: a field is out of range, or the pieces cannot fit the grid.
    """

    pieces: tuple[int, int] = (3, 3)
    grid: int = 7
    cell: int = 5

    def __post_init__(self) -> None:
        check_range("pieces", self.pieces, 255)
        if self.grid < 4:
            raise ValueError(f"grid: {self.grid} cells cannot hold every tetromino; use at least 4")
        if self.cell < 1:
            raise ValueError(f"cell: {self.cell} pixels cannot be drawn; use at least 1")
        if 4 * self.pieces[1] > self.grid**2:
            raise ValueError(self._crowded())

    def render_range(self, seed: int, first: int, count: int) -> Scenes:
        """Scenes `first` .. `first + count - 1`. A scene is a function of (seed, its index) and the fields alone.

        A piece's shape is uniform among the shapes that still fit somewhere, its position uniform among the free
        ones, its colour uniform and independent.

        Returns:
            `Scenes`; factors, all [count, most]: `shape` int64 index into SHAPES, `color` int64 index into COLORS,
            `x`, `y` float32 centre of mass as a fraction of the image's side.

        Raises:
            ValueError: a scene is so crowded that no piece fits any more.
        """
        rows = [generator(seed, Purpose.SCENES, place=first + row).random(self._draws()) for row in range(count)]
        return self._drawn(np.array(rows).reshape(count, self._draws()))

    def render(self, seed: int, shard: int, count: int) -> Scenes:
        """Rows 0 .. count - 1 of a shard; otherwise as `render_range`. Row i is a function of (seed, shard, i)."""
        # A shard's rows follow each other in one stream, filled in row order: later rows never move earlier ones.
        return self._drawn(generator(seed, Purpose.SCENES, step=shard).random((count, self._draws())))

    def _draws(self) -> int:
        return 1 + 3 * self.pieces[1]

    def _drawn(self, uniform: NDArray[np.float64]) -> Scenes:
        """The scenes that uniform numbers in [0, 1) stand for, a row [1 + 3 M] a scene."""
        count = len(uniform)
        fewest, most = self.pieces
        placements, shape_of = _placements(self.grid)  # [P, C], [P]
        centres = _centres(placements, self.grid)  # [P, 2]
        first = np.searchsorted(shape_of, np.arange(len(SHAPES)))  # [S] first placement of each shape

        num_objects = fewest + _pick(uniform[:, 0], np.full(count, most - fewest + 1))  # [N]
        draws = uniform[:, 1:].reshape(count, most, 3)  # [N, M, (shape, position, color)]

        cells = np.zeros((count, self.grid**2), dtype=np.uint8)  # [N, C] which object covers each cell
        shape = np.full((count, most), -1, dtype=np.int64)
        color = np.full((count, most), -1, dtype=np.int64)
        position = np.full((count, most, 2), -1, dtype=np.float32)
        blocks = placements.astype(np.float32)  # [P, C]
        for i in range(most):
            rows = np.flatnonzero(num_objects > i)
            covered = (cells[rows] > 0).astype(np.float32)  # [n, C]
            free = covered @ blocks.T == 0  # [n, P]
            per_shape = np.add.reduceat(free, first, axis=1, dtype=np.int64)  # [n, S] free positions of each shape
            fits = per_shape > 0
            if not fits.any(axis=1).all():
                raise ValueError(self._crowded())
            s = _nth_true(fits, _pick(draws[rows, i, 0], fits.sum(axis=1)))  # [n]
            n_th = _pick(draws[rows, i, 1], per_shape[np.arange(len(rows)), s])
            p = _nth_true(free & (shape_of == s[:, None]), n_th)  # [n]
            cells[rows] += placements[p] * np.uint8(i + 1)
            shape[rows, i] = s
            color[rows, i] = _pick(draws[rows, i, 2], np.full(len(rows), len(COLORS)))
            position[rows, i] = centres[p]

        palette = np.zeros((count, most + 1, 3), dtype=np.uint8)  # [N, 1 + M, 3], 0 is the black background
        palette[:, 1:] = np.where(color[..., None] >= 0, np.array(list(COLORS.values()), dtype=np.uint8)[color], 0)
        colored = np.take_along_axis(palette, cells[..., None].astype(np.int64), axis=1)  # [N, C, 3]
        return Scenes(
            images=_enlarge(colored.reshape(count, self.grid, self.grid, 3), self.cell),
            masks=_enlarge(cells.reshape(count, self.grid, self.grid), self.cell),
            num_objects=num_objects,
            factors={"shape": shape, "color": color, "x": position[..., 0], "y": position[..., 1]},
        )

    def _crowded(self) -> str:
        return (
            f"pieces: {self.pieces[1]} pieces do not always fit grid: {self.grid} ({self.grid}x{self.grid} cells); "
            "use fewer pieces or a larger grid"
        )


def _placements(grid: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Every shape at every position: the cells it covers [P, grid * grid], and its shape [P], in order of shape."""
    covers, shapes = [], []
    for index, drawing in enumerate(SHAPES.values()):
        piece = np.array([[character == "#" for character in line] for line in drawing])
        height, width = piece.shape
        for row in range(grid - height + 1):
            for column in range(grid - width + 1):
                board = np.zeros((grid, grid), dtype=np.bool_)
                board[row : row + height, column : column + width] = piece
                covers.append(board.ravel())
                shapes.append(index)
    return np.stack(covers), np.array(shapes, dtype=np.int64)


def _centres(placements: NDArray[np.bool_], grid: int) -> NDArray[np.float32]:
    """Centre of mass (x, y) of every placement as a fraction of the side, [P, 2]."""
    row, column = np.divmod(np.arange(grid**2), grid)  # [C], [C]
    middle = (np.stack([column, row], axis=1) + 0.5) / grid  # [C, 2]
    return (placements @ middle / 4).astype(np.float32)


def _pick(uniform: NDArray[np.float64], options: NDArray[np.int64]) -> NDArray[np.int64]:
    """An index in [0, options) from a uniform number in [0, 1): u * n never rounds up to n in float64."""
    return (uniform * options).astype(np.int64)


def _nth_true(flags: NDArray[np.bool_], n: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the n-th true flag of each row. [N, P], [N] -> [N]."""
    beyond = np.cumsum(flags, axis=1, dtype=np.int32) > n[:, None]  # [N, P]
    nth: NDArray[np.int64] = np.argmax(beyond, axis=1)  # the first flag beyond n
    return nth


def _enlarge(cells: NDArray[np.uint8], pixels: int) -> NDArray[np.uint8]:
    """Each cell becomes a square of pixels. [N, g, g, ...] -> [N, g * pixels, g * pixels, ...]."""
    return cells.repeat(pixels, axis=1).repeat(pixels, axis=2)
