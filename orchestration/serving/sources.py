"""Where the images of a set come from: shards at any address, or a folder of image files. Read a unit at a time."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from orchestration.serving.images import ImageError, Pixels, decoded
from pipelines import DataError, Plan, Sources, read_index
from pipelines.plan import Window
from pipelines.reader import Fault, Reader
from pipelines.samples import BadSample, decode
from pipelines.shards import INDEX, natural
from pipelines.sources import local_path, shown

IMAGE_FILES = (".png", ".jpg", ".jpeg")
MOST_PIXELS = 2**27
"""Of an image file: it is decoded whole, at 3 bytes a pixel, before it is resized."""
_FILES_IN_A_UNIT = 1024


@dataclass(frozen=True)
class Image:
    """One image of a set, not decoded yet.

    Fields:
        key: its name in the set.
        decode: uint8 [H, W, 3]; raises ImageError.
    """

    key: str
    decode: Callable[[], Pixels]


class Source(Protocol):
    """A set of images in a fixed order, in units that are read on their own. Travels to workers.

    Fields:
        shown: its address, without secrets.
        digest: changes with its images.
        units: (name, images) of each.
    """

    shown: str
    digest: str
    units: list[tuple[str, int]]

    def read(self, unit: int) -> Iterator[Image]:
        """The images of a unit, in order.

        Raises:
            DataError: the unit is damaged, absent, or the storage does not answer.
        """


class ShardSource:
    """A set of shards: a folder, an address, or a brace pattern.

    Raises:
        DataError: it has no index, or the storage does not answer.
    """

    def __init__(self, place: str) -> None:
        path = local_path(place)
        self._folder = str(path.absolute()) if path is not None else place  # workers stand in another folder
        self._index = read_index(self._folder)
        self.shown, self.digest = shown(place), self._index.digest
        names = [shard.name.removesuffix(".tar") for shard in self._index.shards]
        if len(set(names)) < len(names):  # of several folders
            names = [f"{number:06d}-{name}" for number, name in enumerate(names)]
        self.units = [(name, shard.samples) for name, shard in zip(names, self._index.shards, strict=True)]

    def read(self, unit: int) -> Iterator[Image]:
        folders = self._index.folders
        index = replace(self._index, shards=(self._index.shards[unit],), folders=folders[unit : unit + 1])
        plan = Plan(index, batch_size=index.num_samples, seed=0, lanes=1, window=1)
        samples = Reader(plan, self._folder, False, Sources(), None).window(Window(epoch=0, lane=0, number=0))
        for number in range(index.num_samples):
            sample = samples[number]
            if isinstance(sample, Fault):  # of the whole shard
                raise DataError(f"{index.shards[0].name}: {sample.reason}")
            yield Image(sample.key, partial(_of_sample, sample.members))


class FolderSource:
    """The PNG and JPEG files of a folder, and of the folders in it.

    Raises:
        DataError: there are none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        found = (
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in IMAGE_FILES
        )
        self._files = sorted(found, key=natural)
        if not self._files:
            raise DataError(
                f"{folder}: neither an {INDEX} nor an image ({', '.join(IMAGE_FILES)}) in it; name a set of shards or "
                "a folder of images"
            )
        self.shown = str(folder)
        facts = [(name, stat.st_size, stat.st_mtime_ns) for name in self._files for stat in [(folder / name).stat()]]
        self.digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        starts = range(0, len(self._files), _FILES_IN_A_UNIT)
        self.units = [
            (f"images-{number:06d}", min(_FILES_IN_A_UNIT, len(self._files) - start))
            for number, start in enumerate(starts)
        ]

    def read(self, unit: int) -> Iterator[Image]:
        for name in self._files[unit * _FILES_IN_A_UNIT : (unit + 1) * _FILES_IN_A_UNIT]:
            yield Image(name, partial(read_image, self._folder / name))


def read_image(path: Path) -> Pixels:
    """A PNG or JPEG file, upright, as uint8 [H, W, 3].

    Raises:
        ImageError: it is not there, or not an image that can be used.
    """
    try:
        return decoded(path.read_bytes(), MOST_PIXELS)
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from None


def _of_sample(members: Mapping[str, bytes]) -> Pixels:
    try:
        return decode(members, with_masks=False).image
    except BadSample as error:
        raise ImageError(str(error)) from error


def source_of(place: str) -> Source:
    """What an address stands for: shards, unless it is a local folder without an index.

    Raises:
        DataError: there is nothing of either kind.
    """
    path = local_path(place)
    if path is not None and path.is_dir() and not (path / INDEX).is_file():
        return FolderSource(path)
    return ShardSource(place)
