"""Existing WebDataset shards, brought into the form and size that training takes.

Image members: `image.png`, `image.jpg`, `png`, `jpg`, ... (as `pipelines.samples`). Masks, whichever comes first:

* `masks.png`, `mask.png`: label maps;
* `masks.npy`, `mask.npy`, `mask.npy.gz`: label maps [H, W], or one plane an entity [E, H, W] or [E, H, W, 1], as the
  shards of the Object-Centric Learning Framework have them. Where planes overlap, the later one lies on top. With
  `visibility.npy` [E] the first plane is the background's and the visible ones are the objects; without, every plane is
  an object.

`category.npy` (one value an object, in the order of planes or ids) becomes a factor, and `json` keeps its `factors` and
`num_objects`. Boxes are left behind: they follow from the masks.
"""

import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.ingest.picture import BadRecord, Picture, decoded, decoded_ids
from pipelines.ingest.source import Record, file_stamp
from pipelines.samples import IMAGE_MEMBERS
from pipelines.shards import scan_samples, tar_names

_MASKS = ("masks.png", "mask.png", "masks.npy", "mask.npy", "mask.npy.gz")
_LARGEST = 2**30
"""Bytes that a packed array may unpack to."""


@dataclass(frozen=True)
class WebDataset:
    """The samples of a folder of tars, in natural order. No member is unpacked to a file: none can lead anywhere."""

    folder: Path

    @property
    def format(self) -> str:
        return "webdataset"

    @property
    def facts(self) -> Mapping[str, Any]:
        return {}

    def records(self) -> Sequence[Record]:
        """
        Raises:
            DataError: there are no tars, or one is cut off or damaged.
        """
        found: list[Record] = []
        for name in tar_names(self.folder):
            stamp = file_stamp(self.folder / name)
            for key, entries in scan_samples(self.folder / name):
                found.append(Record(len(found), f"{name} {key}", (name, entries), f"{stamp} {key}"))
        return found

    @contextmanager
    def reading(self) -> Iterator[Callable[[Any], Iterator[Picture]]]:
        with ExitStack() as stack:
            opened: dict[str, Any] = {}

            def read(content: tuple[str, Mapping[str, tuple[int, int]]]) -> Iterator[Picture]:
                name, entries = content
                if name not in opened:
                    opened[name] = stack.enter_context((self.folder / name).open("rb"))
                members = {}
                for member, (offset, size) in entries.items():
                    opened[name].seek(offset)
                    members[member] = opened[name].read(size)
                yield _picture(members)

            yield read


def _picture(members: Mapping[str, bytes]) -> Picture:
    name = next((name for name in IMAGE_MEMBERS if name in members), None)
    if name is None:
        raise BadRecord(f"it has no image member (it has {', '.join(sorted(members))})")
    picture = decoded(members[name])
    masks, objects = _masks(members, picture.image.shape[:2])
    facts = _facts(members.get("json"))
    most = len(objects) if objects is not None else 0 if masks is None else int(masks.max(initial=0))
    factors = {name: values for name, values in facts["factors"].items() if len(values) >= most}
    if "category.npy" in members:
        category = _array("category.npy", members["category.npy"]).reshape(-1)
        if objects is not None and len(category) > most:
            category = category[objects]  # one a plane, the background's and the invisible ones' too
        if len(category) >= most:
            factors["category"] = category.tolist()
    count = facts["num_objects"]
    if "visibility.npy" in members and objects is not None:
        count = len(objects)
    return Picture(
        image=picture.image,
        masks=masks,
        num_objects=count if masks is None or (count is not None and count >= most) else None,
        factors=factors,
        encoded=picture.encoded,
    )


def _masks(
    members: Mapping[str, bytes], size: tuple[int, ...]
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """(label map [H, W] or None, the planes that are objects [n] where there are planes)."""
    name = next((name for name in _MASKS if name in members), None)
    if name is None:
        return None, None
    ids = decoded_ids(members[name]) if name.endswith(".png") else _array(name, members[name])
    if ids.ndim == 4 and ids.shape[3] == 1:
        ids = ids[..., 0]
    if ids.dtype.kind not in "uib" or ids.shape[-2:] != size or ids.ndim not in (2, 3):
        raise BadRecord(
            f"{name} is {ids.dtype} {list(ids.shape)}; for this image ids {list(size)} or planes of them fit"
        )
    if ids.min(initial=0) < 0 or ids.max(initial=0) > 65535:
        raise BadRecord(f"{name} holds ids from {ids.min()} to {ids.max()}; 0 to 65535 are possible")
    if ids.ndim == 2:
        return ids.astype(np.int64), None
    objects = np.arange(len(ids))
    if "visibility.npy" in members:
        visible = _array("visibility.npy", members["visibility.npy"]).reshape(-1)
        if len(visible) != len(ids):
            raise BadRecord(f"visibility.npy has {len(visible)} values for {len(ids)} planes")
        objects = np.flatnonzero(visible[1:]) + 1
    labels = np.zeros(size, dtype=np.int64)
    for label, plane in enumerate(objects, start=1):
        labels[ids[plane] > 0] = label
    return labels, objects


def _array(name: str, data: bytes) -> NDArray[Any]:
    """An array as numpy writes it, packed by GZIP or not; nothing is unpickled."""
    if data[:2] == b"\x1f\x8b":
        unpack = zlib.decompressobj(wbits=31)
        data = unpack.decompress(data, _LARGEST)
        if not unpack.eof:
            raise BadRecord(f"{name} is cut off, or more than {_LARGEST} bytes")
    try:
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
    except (ValueError, EOFError, OSError) as error:
        raise BadRecord(f"{name}: {error}") from error


def _facts(data: bytes | None) -> dict[str, Any]:
    """What is used of a sample's JSON: `num_objects` (None where unknown) and `factors`."""
    try:
        facts = {} if data is None else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"json: {error}") from error
    facts = facts if isinstance(facts, dict) else {}
    count, factors = facts.get("num_objects"), facts.get("factors")
    return {
        "num_objects": count if type(count) is int and count >= 0 else None,
        "factors": {k: v for k, v in factors.items() if isinstance(v, list)} if isinstance(factors, dict) else {},
    }
