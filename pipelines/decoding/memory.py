"""Where the pixels of a step lie in a block of memory, which may be shared with other processes."""

import math
import mmap
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Past a multiple of 32 bytes: into pixels that begin at one libjpeg-turbo writes around the caches (jdcolext-avx2.asm),
# which makes decoding a JPEG of 128x128 a tenth slower, and whoever reads the pixels next waits for them.
_ASIDE = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """Room for `rows` images of a size, and as many masks where they are wanted."""

    rows: int
    size: tuple[int, int]
    with_masks: bool

    @property
    def bytes(self) -> int:
        """What a block takes: whole units of what can be mapped alone."""
        return self._up(self._masks_at + 2 * self._mask_rows * math.prod(self.size), mmap.ALLOCATIONGRANULARITY)

    def views(self, block: mmap.mmap | bytearray) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        """Images, uint8 [rows, H, W, 3], and masks, uint16 [rows, H, W] (no rows where they are not wanted)."""
        images, masks = (self.rows, *self.size, 3), (self._mask_rows, *self.size)
        return (
            np.frombuffer(block, np.uint8, math.prod(images), _ASIDE).reshape(images),
            np.frombuffer(block, np.uint16, math.prod(masks), self._masks_at).reshape(masks),
        )

    @property
    def _mask_rows(self) -> int:
        return self.rows if self.with_masks else 0

    @property
    def _masks_at(self) -> int:
        return self._up(_ASIDE + 3 * self.rows * math.prod(self.size), 64)

    @staticmethod
    def _up(count: int, unit: int) -> int:
        return -(-count // unit) * unit
