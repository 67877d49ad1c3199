"""A folder of images, with or without a folder of masks, into a training set and a held-out set."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipelines.errors import DataError
from pipelines.index import Index, Shard
from pipelines.samples import encode
from pipelines.shards import natural, write_index, write_shard

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MASK_SUFFIXES = (".png",)


@dataclass(frozen=True)
class Ingested:
    """What became of a folder.

    Fields:
        train: index of `out/train`.
        held_out: index of `out/eval`, or None where nothing was held out.
        unreadable: the files that could not be read, relative to their folder, with the reason.
    """

    train: Index
    held_out: Index | None
    unreadable: tuple[str, ...]


def ingest_folder(
    images: Path | str,
    out: Path | str,
    *,
    size: int,
    masks: Path | str | None = None,
    samples_per_shard: int = 1024,
    held_out: float = 0.05,
) -> Ingested:
    """Write every image below a folder into shards, as squares: centre crop, then resize.

    Images (png, jpg, webp, at any depth) are taken in natural order and turned as their EXIF says; a mask has its
    image's relative path with the suffix .png, holds 8-bit ids, 0 for background, and is cut alike; ids are renumbered
    1, 2, ... in order. The held-out images are evenly spaced over the natural order, so that both sets see all of it.
    The bytes written are a function of the files and the arguments. A file that cannot be read is left out, logged and
    listed in the result.

    Args:
        images: folder to read.
        out: gets the folders `train` and `eval`.
        size: pixels a side.
        masks: folder of masks; every image must have one.
        samples_per_shard: the last shard of a set may have fewer.
        held_out: share of the images for `eval`, in [0, 1): at least one image unless it is 0.

    Raises:
        ValueError: an argument is out of range.
        DataError: there are no images, masks are missing, or no readable image is left for a set.
    """
    images, out = Path(images), Path(out)
    for name, value in (("size", size), ("samples_per_shard", samples_per_shard)):
        if value < 1:
            raise ValueError(f"{name}: {value} is less than 1; use a positive number")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: {held_out} is not in [0, 1); use a share such as 0.05")
    pairs = _pairs(images, Path(masks) if masks is not None else None)
    chosen = _evenly_spaced(len(pairs), held_out)
    unreadable: list[str] = []
    sets: dict[str, Index] = {}
    for name, selected in (("train", ~chosen), ("eval", chosen)):
        numbers = np.flatnonzero(selected)
        if name == "eval" and not len(numbers):
            continue
        shards: list[Shard] = []
        samples = _samples(images, pairs, numbers, size, unreadable)
        while shard := list(islice(samples, samples_per_shard)):
            shards.append(write_shard(out / name, f"{len(shards):06d}.tar", shard))
        if not shards:
            raise DataError(
                f"{images}: no readable image for the {name} set ({len(pairs)} found, {len(unreadable)} unreadable); "
                "add images or change held_out"
            )
        about = {"ingest": "folder", "set": name, "size": size, "held_out": held_out, "masks": masks is not None}
        sets[name] = write_index(out / name, shards, about)
    if unreadable:
        logger.warning("%s: %d of %d files left out: %s", images, len(unreadable), len(pairs), "; ".join(unreadable))
    return Ingested(sets["train"], sets.get("eval"), tuple(unreadable))


def _pairs(images: Path, masks: Path | None) -> list[tuple[Path, Path | None]]:
    """(image, mask) in natural order."""
    if not images.is_dir():
        raise DataError(f"{images}: not a folder; name the folder that holds the images")
    found = [path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    found.sort(key=lambda path: natural(path.relative_to(images).as_posix()))
    if not found:
        raise DataError(f"{images}: no images in it (.png, .jpg, .jpeg, .webp); name the folder that holds them")
    if masks is None:
        return [(path, None) for path in found]
    pairs = [(path, masks / path.relative_to(images).with_suffix(".png")) for path in found]
    missing = [mask.relative_to(masks).as_posix() for _, mask in pairs if not mask.is_file()]
    if missing:
        raise DataError(
            f"{masks}: {len(missing)} of {len(pairs)} masks are missing, the first is {missing[0]}; add them"
        )
    return list(pairs)


def _evenly_spaced(count: int, share: float) -> NDArray[np.bool_]:
    """Which of `count` things to hold out, bool [count]."""
    chosen = np.zeros(count, dtype=np.bool_)
    number = max(1, round(count * share)) if share else 0
    chosen[(2 * np.arange(number) + 1) * count // max(2 * number, 1)] = True  # the middles of equal parts
    return chosen


def _samples(
    images: Path,
    pairs: Sequence[tuple[Path, Path | None]],
    numbers: NDArray[np.int64],
    size: int,
    unreadable: list[str],
) -> Iterator[dict[str, Any]]:
    for number in numbers:
        path, mask_path = pairs[number]
        name = path.relative_to(images).as_posix()
        try:
            image = _image(path, size)
            mask = None if mask_path is None else _mask(path, mask_path, size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            unreadable.append(f"{name} ({error})")
            continue
        facts: dict[str, Any] = {"source": name}
        if mask is not None:
            facts["num_objects"] = int(mask.max())
        yield encode(f"{number:08d}", image, mask, facts)


def _image(path: Path, size: int) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return np.array(ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR))  # [S, S, 3]


def _mask(image_path: Path, path: Path, size: int) -> NDArray[np.uint8]:
    with Image.open(image_path) as image, Image.open(path) as mask:
        expected = ImageOps.exif_transpose(image).size
        if mask.mode not in ("L", "P"):
            raise ValueError(f"mask {path.name} has mode {mask.mode}; save it with 8-bit ids")
        if mask.size != expected:
            raise ValueError(f"mask {path.name} is {mask.size}, its image {expected} (width, height)")
        ids = Image.fromarray(np.array(mask))  # of a palette mask the indices, not the colours
    cut = np.array(ImageOps.fit(ids, (size, size), Image.Resampling.NEAREST))  # [S, S]
    present = np.unique(cut[cut > 0])  # objects outside the crop are gone: the rest are 1, 2, ...
    return np.where(cut > 0, np.searchsorted(present, cut) + 1, 0).astype(np.uint8)
