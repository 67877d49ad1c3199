"""A folder of images, with or without a folder of masks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.errors import DataError
from pipelines.ingest.picture import BadRecord, Picture, decoded, decoded_ids
from pipelines.ingest.source import Record, file_stamp
from pipelines.shards import natural

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Folder:
    """Every image below a folder (png, jpg, webp), in natural order, turned as its EXIF says.

    A mask has its image's relative path with the suffix .png, and the size of the upright image; it holds ids of 8 or
    16 bits, or a palette's indices, 0 for background. The objects in view are counted, and renumbered 1, 2, ...

    Fields:
        images: folder to read.
        masks: folder of masks; every image must have one.
    """

    images: Path
    masks: Path | None = None

    @property
    def format(self) -> str:
        return "images" if self.masks is None else "images-with-masks"

    @property
    def facts(self) -> Mapping[str, Any]:
        return {}

    def records(self) -> Sequence[Record]:
        """
        Raises:
            DataError: there are no images, or masks are missing.
        """
        images = self.images
        if not images.is_dir():
            raise DataError(f"{images}: not a folder; name the folder that holds the images, or another --format")
        found = [path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        names = sorted((path.relative_to(images).as_posix() for path in found), key=natural)
        if not names:
            raise DataError(f"{images}: no images in it (.png, .jpg, .jpeg, .webp); name the folder that holds them")
        stamps = [file_stamp(images / name) for name in names]
        if self.masks is not None:
            masks = [_mask_of(name) for name in names]
            if missing := [mask for mask in masks if not (self.masks / mask).is_file()]:
                raise DataError(
                    f"{self.masks}: {len(missing)} of {len(names)} masks are missing, the first is {missing[0]}; "
                    "add them"
                )
            stamps = [f"{s}; {file_stamp(self.masks / mask)}" for s, mask in zip(stamps, masks, strict=True)]
        return [Record(i, name, name, stamp) for i, (name, stamp) in enumerate(zip(names, stamps, strict=True))]

    @contextmanager
    def reading(self) -> Iterator[Callable[[Any], Iterator[Picture]]]:
        yield self._read

    def _read(self, name: str) -> Iterator[Picture]:
        picture = decoded((self.images / name).read_bytes(), upright=True)
        if self.masks is None:
            yield picture
            return
        mask = _mask_of(name)
        try:
            ids = decoded_ids((self.masks / mask).read_bytes())
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadRecord(f"mask {mask}: {error}") from error
        if ids.shape != picture.image.shape[:2]:
            height, width = picture.image.shape[:2]
            raise BadRecord(f"mask {mask} is {ids.shape[0]}x{ids.shape[1]}, its image {height}x{width}")
        yield Picture(picture.image, ids, encoded=picture.encoded)


def _mask_of(name: str) -> str:
    return str(Path(name).with_suffix(".png").as_posix())
