"""MOVi (Kubric, Greff et al. 2022) as TFDS distributes it: plain TFRecord files, a video a record, a frame a sample.

A frame's label map holds instance + 1. The instances in view are counted and renumbered, and their factors kept: what
an instance has once (category, colour, ...) and what it has in every frame (visibility, position in the image, ...).
A frame that cannot be used makes its video unusable, so that no video has holes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.ingest.example import Feature, required
from pipelines.ingest.picture import BadRecord, Picture, decoded, decoded_ids
from pipelines.shards import natural

# How many numbers: of an instance, and of an instance in a frame. None is a single one.
_STATIC: Mapping[str, int | None] = {
    "category": None,
    "shape_label": None,
    "size_label": None,
    "color_label": None,
    "material_label": None,
    "is_dynamic": None,
    "mass": None,
    "friction": None,
    "restitution": None,
    "scale": None,
    "size": None,
    "color": 3,
}
_MOVING: Mapping[str, int | None] = {
    "visibility": None,
    "image_positions": 2,
    "positions": 3,
    "velocities": 3,
    "quaternions": 4,
}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class Movi:
    """Frames of MOVi videos."""

    format: str = "movi"

    def count(self, features: Mapping[str, Feature]) -> int:
        """Frames of the video."""
        return len(required(features, "video").strings())

    def pictures(self, features: Mapping[str, Feature]) -> Iterator[Picture]:
        """The frames in order.

        Raises:
            BadRecord: a feature is missing, or frames, segmentations and instances do not fit each other.
        """
        video = required(features, "video").strings()
        segmentations = required(features, "segmentations").strings()
        frames, instances = _single(features, "metadata/num_frames"), _single(features, "metadata/num_instances")
        if not len(video) == len(segmentations) == frames:
            raise BadRecord(f"{len(video)} frames, {len(segmentations)} segmentations, metadata/num_frames {frames}")
        static = dict(_factors(features, _STATIC, instances, 1))
        moving = dict(_factors(features, _MOVING, instances, frames))
        name = required(features, "metadata/video_name").strings()
        for frame, (image, segmentation) in enumerate(zip(video, segmentations, strict=True)):
            picture, masks = decoded(image), decoded_ids(segmentation)
            if masks.shape != picture.image.shape[:2]:
                raise BadRecord(
                    f"frame {frame}: segmentation {list(masks.shape)}, image {list(picture.image.shape[:2])}"
                )
            if masks.max(initial=0) > instances:
                raise BadRecord(f"frame {frame}: id {masks.max()} in its segmentation of {instances} instances")
            yield Picture(
                image=picture.image,
                masks=masks,
                factors={key: values[:, 0].tolist() for key, values in static.items()}
                | {key: values[:, frame].tolist() for key, values in moving.items()},
                facts={"video": name[0].decode(errors="replace") if name else "", "frame": frame},
                encoded=picture.encoded,
            )


def tfrecord_files(path: Path | str) -> tuple[Path, ...]:
    """The TFRecord files that are meant: one file, a folder's, or those whose name begins alike.

    A folder with several sets (train, validation) needs the beginning: `FOLDER/movi_c-train`.

    Raises:
        DataError: there are none, they are of several sets, or some of a numbered set are missing.
    """
    path = Path(path)
    if path.is_file():
        return (path,)
    folder, beginning = (path, "") if path.is_dir() else (path.parent, path.name)
    files = [file for file in folder.glob("*.tfrecord*") if file.name.startswith(beginning) and file.is_file()]
    files.sort(key=lambda file: natural(file.name))
    if not files:
        raise DataError(f"{path}: no .tfrecord files; name a file, a folder, or how the files' names begin")
    sets: dict[str, list[str]] = {}
    for file in files:
        numbered = _SHARD.fullmatch(file.name)
        sets.setdefault(numbered[1] if numbered else file.name, []).append(file.name)
    if len(sets) > 1:
        names = [name.split(".tfrecord")[0] for name in sets]
        raise DataError(f"{path}: files of {len(sets)} sets ({', '.join(names)}); name one: {folder / names[0]}")
    if numbered := _SHARD.fullmatch(files[0].name):
        missing = {f"{numbered[1]}-{i:05d}-of-{numbered[3]}" for i in range(int(numbered[3]))} - set(*sets.values())
        if missing:
            raise DataError(f"{path}: {len(missing)} of {numbered[3]} files are missing, the first is {min(missing)}")
    return tuple(files)


def _single(features: Mapping[str, Feature], name: str) -> int:
    values = required(features, name).integers()
    if len(values) != 1 or values[0] < 0:
        raise BadRecord(f"feature {name}: {values.tolist()[:3]} is not one count")
    return int(values[0])


def _factors(
    features: Mapping[str, Feature], known: Mapping[str, int | None], instances: int, times: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    """(name, values [instances, times] or [instances, times, k]) of those that the set has in this form."""
    for name, size in known.items():
        feature = features.get(f"instances/{name}")
        if feature is None or feature.kind not in ("floats", "integers"):
            continue
        values = feature.numbers()
        if len(values) == instances * times * (size or 1):  # the sets A to F differ in what some names mean
            yield name, np.asarray(values).reshape(instances, times, *(() if size is None else (size,)))
