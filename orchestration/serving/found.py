"""What was found in an image, and the ways to tell it: facts, a label map, run lengths, pictures."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orchestration.pictures import overlay, slot_colours

SHOWN_SIDE = 280
"""Pixels that a drawn picture has a side, about: small images are enlarged by a whole number."""


@dataclass(frozen=True)
class Found:
    """What a model says of an image.

    Fields:
        image: uint8 [S, S, 3], as the model saw it.
        objects: how many, the background's slots not counted.
        keep: bool [K], whether the image needs the slot.
        keep_probability: float32 [K].
        masks: float32 [K, S, S], each slot's share of each pixel.
        drawn: uint8 [S, S, 3], the image as the slots draw it; None where they draw features.
    """

    image: NDArray[np.uint8]
    objects: int
    keep: NDArray[np.bool_]
    keep_probability: NDArray[np.float32]
    masks: NDArray[np.float32]
    drawn: NDArray[np.uint8] | None = None

    def facts(self) -> dict[str, Any]:
        """Numbers for JSON; six decimals."""
        return {
            "objects": self.objects,
            "keep": self.keep.tolist(),
            "keep_probability": [round(float(value), 6) for value in self.keep_probability],
            "mask_share": [round(float(value), 6) for value in self.masks.mean(axis=(1, 2), dtype=np.float64)],
        }

    def labels(self) -> NDArray[np.uint8]:
        """uint8 [S, S]: 1 + the kept slot with the largest share of the pixel; 0 where no slot is kept."""
        if not self.keep.any():
            return np.zeros(self.masks.shape[1:], dtype=np.uint8)
        shares = np.where(self.keep[:, None, None], self.masks, -1)  # [K, S, S]
        labels: NDArray[np.uint8] = (1 + shares.argmax(axis=0)).astype(np.uint8)
        return labels

    def run_lengths(self) -> list[dict[str, Any]]:
        """Of each kept slot, its pixels of the label map in COCO's uncompressed run lengths, column by column."""
        labels = self.labels()
        return [
            {"slot": slot, "size": list(labels.shape), "counts": _runs(labels == slot + 1)}
            for slot in np.flatnonzero(self.keep).tolist()
        ]

    def overlay(self, *, enlarge: bool = True) -> NDArray[np.uint8]:
        """The image, greyed, under each slot's colour. uint8 [S, S, 3], or a multiple of it that can be looked at."""
        drawn = _bytes(overlay(self.image, self.masks))
        return enlarged(drawn) if enlarge else drawn

    def strip(self) -> NDArray[np.uint8]:
        """The image, how the slots draw it, the overlay, and what each slot takes of it; kept slots have a frame.

        uint8 [H, W, 3].
        """
        cells = [self.image] + ([] if self.drawn is None else [self.drawn])
        cells = [enlarged(cell) for cell in cells] + [self.overlay()]
        for slot, mask in enumerate(self.masks):
            share = mask[:, :, None]  # [S, S, 1]
            taken = self.image / 255 * share + 1 - share
            cell = enlarged(_bytes(taken if self.keep[slot] else 0.8 + 0.2 * taken))
            cells.append(_framed(cell, slot) if self.keep[slot] else cell)
        gap = np.full((cells[0].shape[0], 8, 3), 255, dtype=np.uint8)
        return np.hstack([part for cell in cells for part in (cell, gap)][:-1])


def png(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W] or [H, W, 3]; fast rather than small."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def enlarged(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Small pictures are repeated pixel by pixel, so that they can be looked at."""
    times = max(1, SHOWN_SIDE // pixels.shape[0])
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def _bytes(picture: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """0..1 -> 0..255."""
    pixels: NDArray[np.uint8] = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return pixels


def _framed(cell: NDArray[np.uint8], slot: int) -> NDArray[np.uint8]:
    colour = _bytes(slot_colours(slot + 1)[slot])
    edge = np.ones(cell.shape[:2], dtype=bool)
    edge[6:-6, 6:-6] = False
    return np.where(edge[:, :, None], colour, cell)


def _runs(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of runs of unset and set pixels in turn, beginning with unset ones (which may be none)."""
    flat = mask.ravel(order="F")
    bounds = np.flatnonzero(np.diff(flat)) + 1
    lengths: list[int] = np.diff(np.concatenate([[0], bounds, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths
