"""A contact sheet of a set: some of its samples, each image beside itself with its masks laid over in colours."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipelines.errors import DataError
from pipelines.index import Index
from pipelines.noise import Purpose, generator
from pipelines.samples import UNKNOWN, BadSample, Sample, decode
from pipelines.shards import kinds, read_index, read_sample

_SMALLEST = 96
"""Smaller pictures are enlarged by whole pixels until a side reaches it."""
_GAP = 10
_SEAM = 2
_CAPTION = 14
_PAPER = (24, 24, 24)
_INK = (220, 220, 220)
_STRENGTH = 0.7
_GOLDEN = 0.618033988749895  # of a turn: hues that follow each other lie far apart


def chosen_samples(index: Index, count: int, seed: int) -> list[int]:
    """Numbers of the samples to show: one from each of `count` equal stretches of the set, placed by the seed.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"samples: {count} is less than 1; show at least one")
    count = min(count, index.num_samples)
    edges = np.arange(count + 1) * index.num_samples // count  # [count + 1]
    uniform = generator(seed, Purpose.ORDER).random(count)
    return [int(low + u * (high - low)) for low, high, u in zip(edges[:-1], edges[1:], uniform, strict=True)]


def contact_sheet(folder: Path | str, count: int = 24, seed: int = 0, columns: int = 4) -> Image.Image:
    """A picture of `count` samples of a set, spread over all of it. Equal sets and arguments give equal pictures.

    Each sample is the image and, where there are masks, the image with every object in a colour of its own, under a
    line with the shard, the sample's key and the number of objects.

    Args:
        folder: holds shards and their index.json.
        count: samples to show; fewer where the set has fewer.
        seed: other seeds show other samples.
        columns: samples side by side.

    Raises:
        DataError: the set is not complete, or a sample that is shown cannot be read; both are named.
        ValueError: `count` or `columns` is below 1.
    """
    if columns < 1:
        raise ValueError(f"columns: {columns} is less than 1; use at least one")
    index = read_index(folder)
    tiles = [_tile(Path(folder), index, number) for number in chosen_samples(index, count, seed)]
    return _laid_out(tiles, min(columns, len(tiles)))


def overlay(image: NDArray[np.uint8], masks: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Every object tinted in a colour of its own over grey. [H, W, 3], ids [H, W] -> uint8 [H, W, 3]."""
    palette = np.array([color(label) for label in range(int(masks.max(initial=0)) + 1)], dtype=np.float32)  # [L, 3]
    grey = image.mean(axis=2, keepdims=True)  # [H, W, 1]: the image's own colours would mix with the objects'
    tinted = np.where(masks[..., None] > 0, (1 - _STRENGTH) * grey + _STRENGTH * palette[masks], grey)  # [H, W, 3]
    mixed: NDArray[np.uint8] = np.round(tinted).astype(np.uint8)
    return mixed


def color(label: int) -> tuple[int, int, int]:
    """The colour of an object: neighbours in number are far apart in hue."""
    red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN % 1.0, 0.85 if label % 2 else 0.6, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _tile(folder: Path, index: Index, number: int) -> tuple[str, NDArray[np.uint8]]:
    """(caption, pictures side by side) of a sample."""
    shard, row = index.locate(number)
    name = index.shards[shard].name
    key, members = read_sample(folder, name, row)
    try:
        sample = decode(members, with_masks="masks" in kinds(members), size=index.size)
    except BadSample as error:
        raise DataError(f"{folder / name}: {key}: {error}; verify the set") from error
    return f"{Path(name).stem}/{key}{_objects(sample)}", _pictures(sample)


def _objects(sample: Sample) -> str:
    return "" if sample.num_objects == UNKNOWN else f"  objects: {sample.num_objects}"


def _pictures(sample: Sample) -> NDArray[np.uint8]:
    times = max(1, -(-_SMALLEST // min(sample.image.shape[:2])))
    pictures = [sample.image] if sample.masks is None else [sample.image, overlay(sample.image, sample.masks)]
    large = [picture.repeat(times, axis=0).repeat(times, axis=1) for picture in pictures]
    seam = np.full((large[0].shape[0], _SEAM, 3), _PAPER, dtype=np.uint8)
    return np.concatenate([large[0], *(part for picture in large[1:] for part in (seam, picture))], axis=1)  # [H, *, 3]


def _laid_out(tiles: Sequence[tuple[str, NDArray[np.uint8]]], columns: int) -> Image.Image:
    height = max(picture.shape[0] for _, picture in tiles) + _CAPTION + _GAP
    width = max(picture.shape[1] for _, picture in tiles) + _GAP
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (caption, picture) in enumerate(tiles):
        row, column = divmod(place, columns)
        left, top = _GAP + column * width, _GAP + row * height
        draw.text((left, top), _fitting(draw, caption, width - _GAP), fill=_INK)
        sheet.paste(Image.fromarray(picture), (left, top + _CAPTION))
    return sheet


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    while text and draw.textlength(text) > width:
        text = text[:-1]
    return text
