"""COCO: images beside one JSON of instances, as polygons or run lengths (https://cocodataset.org/#format-data).

* Instances overlap: they are painted from the largest to the smallest, so that the smaller lies on top; equal areas in
  the order of the file.
* `iscrowd` marks a region of many objects that nobody told apart. A label map has no void, so such a region stays
  background unless an instance lies on it: foreground metrics then leave it out. `crowds` in the sample's JSON counts
  them, and they are not in `num_objects`.
* An instance that is hidden, cut away or empty is not in `num_objects`, which counts what is in view.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.ingest.picture import BadRecord, Picture, decoded
from pipelines.ingest.source import Record


@dataclass(frozen=True)
class Coco:
    """The images that a COCO file of annotations lists, in its order; those without annotations have no objects.

    Fields:
        annotations: such as `annotations/instances_train2017.json`.
        images: their folder; None means the one named in the file's name, beside the file's folder: `train2017`.
    """

    annotations: Path
    images: Path | None = None

    @property
    def format(self) -> str:
        return "coco"

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"files": [self.annotations.name]}

    @property
    def folder(self) -> Path:
        """Where the images are."""
        if self.images is not None:
            return self.images
        return self.annotations.parent.parent / self.annotations.stem.removeprefix("instances_")

    def records(self) -> Sequence[Record]:
        """
        Raises:
            DataError: the file is no COCO JSON, or the folder of images is not there.
        """
        try:
            content = json.loads(self.annotations.read_bytes())
            images = [(int(i["id"]), str(i["file_name"]), int(i["height"]), int(i["width"])) for i in content["images"]]
            of_image: dict[int, list[dict[str, Any]]] = {number: [] for number, *_ in images}
            for annotation in content["annotations"]:
                if (number := int(annotation["image_id"])) not in of_image:
                    raise ValueError(f"annotation {annotation.get('id')} is of image {number}, which is not listed")
                of_image[number].append(
                    {key: annotation.get(key) for key in ("segmentation", "category_id", "iscrowd")}
                )
        except OSError as error:
            raise DataError(f"{self.annotations}: cannot be read ({error}); name the JSON of instances") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{self.annotations}: not a COCO file of instances ({type(error).__name__}: {error}); name one"
            ) from error
        if len(of_image) != len(images):
            raise DataError(f"{self.annotations}: {len(images) - len(of_image)} images share an id; give each its own")
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: not a folder; name the folder of images with --images")
        found = []
        for number, (image, name, height, width) in enumerate(images):
            entry = {"file_name": name, "height": height, "width": width, "annotations": of_image[image]}
            stamp = hashlib.sha256(json.dumps(entry).encode()).hexdigest()
            found.append(Record(number, name, entry, f"{stamp} {self._file_stamp(name)}"))
        return found

    @contextmanager
    def reading(self) -> Iterator[Callable[[Any], Iterator[Picture]]]:
        yield self._read

    def _read(self, entry: Mapping[str, Any]) -> Iterator[Picture]:
        height, width = entry["height"], entry["width"]
        # The annotations are drawn on the pixels as they are stored, whatever EXIF says.
        picture = decoded(inside(self.folder, entry["file_name"]).read_bytes())
        if picture.image.shape[:2] != (height, width):
            found = picture.image.shape
            raise BadRecord(f"the image is {found[0]}x{found[1]}, its annotations are of {height}x{width}")
        instances: list[tuple[int, NDArray[np.bool_], Any]] = []
        crowds = 0
        for place, annotation in enumerate(entry["annotations"]):
            if annotation["iscrowd"]:
                crowds += 1
                continue
            covers = _covers(annotation["segmentation"], height, width, place)
            instances.append((int(covers.sum()), covers, annotation["category_id"]))
        instances.sort(key=lambda instance: -instance[0])  # stable: equals stay in the order of the file
        masks = np.zeros((height, width), dtype=np.int64)
        for label, (_, covers, _) in enumerate(instances, start=1):
            masks[covers] = label
        yield Picture(
            image=picture.image,
            masks=masks,
            factors={"category": [category for *_, category in instances]},
            facts={"crowds": crowds} if crowds else {},
            encoded=picture.encoded,
        )

    def _file_stamp(self, name: str) -> str:
        try:
            status = inside(self.folder, name).stat()
        except (BadRecord, OSError, ValueError):
            return "not there"  # found bad when it is read, in its turn
        return f"{status.st_size} {status.st_mtime_ns}"


def inside(folder: Path, name: str) -> Path:
    """A file of a folder by a name that somebody else wrote.

    Raises:
        BadRecord: the name leads out of the folder.
    """
    plain = PurePosixPath(name)
    if not name or plain.is_absolute() or ".." in plain.parts or "\\" in name or "\0" in name:
        raise BadRecord(f"file name {name!r} leads out of its folder")
    path = folder / plain
    if not path.resolve().is_relative_to(folder.resolve()):  # through a link
        raise BadRecord(f"file name {name!r} leads out of its folder")
    return path


def _covers(segmentation: Any, height: int, width: int, place: int) -> NDArray[np.bool_]:
    """Pixels of an instance, bool [H, W]."""
    try:
        from pycocotools import mask as codec
    except ImportError:
        raise DataError("COCO needs pycocotools; pip install 'slotforge[ingest]'") from None
    try:
        if isinstance(segmentation, list):
            polygons = [_polygon(polygon, height, width) for polygon in segmentation]
            if not polygons:
                return np.zeros((height, width), dtype=np.bool_)
            runs = codec.merge(codec.frPyObjects(polygons, height, width))
        elif isinstance(segmentation, dict):
            runs = _runs(segmentation, height, width, codec)
        else:
            raise ValueError(f"a segmentation is polygons or run lengths, not {type(segmentation).__name__}")
        return np.asarray(codec.decode(runs), dtype=np.bool_)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise BadRecord(f"annotation {place} of the image: {error}") from error


def _polygon(polygon: Any, height: int, width: int) -> list[float]:
    """A polygon that the codec can take: it works in memory that grows with the coordinates."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("a polygon is a list of three points or more: x, y, x, y, ...")
    points = [float(value) for value in polygon]
    for value, side in zip(points, (width, height) * (len(points) // 2), strict=True):
        if not math.isfinite(value) or not -side <= value <= 2 * side:
            raise ValueError(f"a polygon's point at {value} is far outside its image")
    return points


def _runs(segmentation: Mapping[str, Any], height: int, width: int, codec: Any) -> Any:
    """Run lengths that the codec can take: it believes sizes and counts."""
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"run lengths of size {segmentation['size']} on an image of {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, str | bytes):
        packed = {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
        counts = _unpacked(packed["counts"])
    if any(type(count) is not int or count < 0 for count in counts) or sum(counts) != height * width:
        raise ValueError(f"run lengths that do not add up to {height * width} pixels")
    return codec.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)


def _unpacked(packed: Sequence[int]) -> list[int]:
    """COCO's compressed run lengths: groups of five bits; from the fourth on, changes against the second last."""
    counts: list[int] = []
    value, shift = 0, 0
    for character in packed:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("run lengths that are not COCO's packed form")
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError("run lengths that end early")
    return counts
