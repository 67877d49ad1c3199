"""Tars as webdataset understands them: which members make a sample, and where each begins."""

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.index import Shard
from pipelines.samples import IMAGE_MEMBERS, MASK_MEMBERS, BadSample, decode
from pipelines.shards.files import Sidecar, read_sidecar


def scan(path: Path, name: str, source: Mapping[str, Any] | None = None) -> Sidecar:
    """What the sidecar of a tar must say, found by reading the tar.

    Args:
        path: where the tar lies now.
        name: what the shard is, or will be, called.
        source: recorded as it is.

    Raises:
        DataError: it is truncated or damaged, or no sample in it can be decoded.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            groups, end = groups_of(tar)
            size = next((size for group in groups if (size := _image_size(tar, group))), None)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{name}: not a whole WebDataset tar ({error}); copy or make it again") from error
    if size is None:
        raise DataError(f"{name}: none of its {len(groups)} samples has a readable image; leave it out of the set")
    offsets = (*(group.offset for group in groups), end)
    return Sidecar(
        shard=Shard(name, path.stat().st_size, sha256_of(path), len(groups)),
        size=size,
        offsets=offsets,
        source=json.loads(json.dumps(source or {})),
        masks=all("masks" in kinds(group.entries) for group in groups),
        crc32=row_sums(path, offsets),
    )


def scan_samples(path: Path) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, (byte position, bytes) by member name) of every sample of a tar, by webdataset's own rules of grouping.

    Raises:
        DataError: it cannot be read, is truncated or damaged.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            groups, _ = groups_of(tar)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(f"{path}: not a whole WebDataset tar ({error}); copy or make it again") from error
    return [
        (group.key, {name: (entry.offset_data, entry.size) for name, entry in group.entries.items()})
        for group in groups
    ]


def read_sample(folder: Path | str, name: str, row: int) -> tuple[str, dict[str, bytes]]:
    """(key, members) of one sample of a shard.

    Raises:
        DataError: the shard or its sidecar is missing or does not match, or the row is not there.
    """
    folder = Path(folder)
    offsets = read_sidecar(folder, name).offsets
    try:
        with (folder / name).open("rb") as file:
            file.seek(offsets[row])
            return parse_sample(file.read(offsets[row + 1] - offsets[row]))
    except (OSError, IndexError, tarfile.TarError, ValueError) as error:
        raise DataError(f"{folder / name}: row {row} cannot be read ({error}); verify the set") from error


def parse_sample(content: bytes) -> tuple[str, dict[str, bytes]]:
    """(key, members) of one sample, from its bytes in a shard.

    Raises:
        tarfile.TarError, ValueError: they are no sample.
    """
    with tarfile.open(fileobj=io.BytesIO(content + bytes(2 * tarfile.BLOCKSIZE)), mode="r:") as tar:
        (group,), _ = groups_of(tar)
        return group.key, members_of(tar, group)


def kinds(members: Iterable[str]) -> frozenset[str]:
    """Which of image, masks and json are among the members' names."""
    known = {"json": "json"} | dict.fromkeys(IMAGE_MEMBERS, "image") | dict.fromkeys(MASK_MEMBERS, "masks")
    return frozenset(known[name] for name in members if name in known)


def sha256_of(path: Path) -> str:
    """Checksum of a file, read in one pass."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row_sums(path: Path, offsets: Sequence[int]) -> tuple[int, ...]:
    """CRC-32 of the bytes of each row of a tar."""
    with path.open("rb") as file:
        file.seek(offsets[0])
        return tuple(zlib.crc32(file.read(end - begin)) for begin, end in pairwise(offsets))


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key in which `b10` follows `b9`."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def tar_names(folder: Path | str) -> list[str]:
    """The tars of a folder in natural order.

    Raises:
        DataError: there are none.
    """
    folder = Path(folder)
    names = sorted((path.name for path in folder.glob("*.tar")), key=natural)
    if not names:
        raise DataError(f"{folder}: no *.tar in it; name the folder that holds the shards")
    return names


@dataclass(frozen=True)
class Group:
    """The members of one sample in a tar: its key, where it begins, and tar entries by member name."""

    key: str
    offset: int
    entries: Mapping[str, tarfile.TarInfo]


def groups_of(tar: tarfile.TarFile) -> tuple[list[Group], int]:
    """The samples of a tar, and where the last one ends, by webdataset's own rules of grouping."""
    from webdataset.tariterators import group_by_keys  # imports torch, which reading an index does without

    files: list[dict[str, Any]] = []
    end = 0
    for entry in tar:
        end = tar.offset
        # What webdataset leaves out: no files, and metadata in double underscores.
        if entry.isreg() and not re.match(r"__[^/]*__($|/)", entry.name):
            files.append({"fname": entry.name, "data": entry, "__url__": str(tar.name)})
    # tarfile ends quietly at a damaged header or a cut between members: only zeros mark a true end.
    assert tar.fileobj is not None
    tar.fileobj.seek(end)
    if (block := tar.fileobj.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"{'damaged header' if block else 'cut off'} at byte {end}")
    groups = []
    for sample in group_by_keys(files):
        entries = {name: entry for name, entry in sample.items() if not name.startswith("__")}
        offset = min(entry.offset for entry in entries.values())
        groups.append(Group(sample["__key__"], offset, entries))
    return groups, end


def members_of(tar: tarfile.TarFile, group: Group) -> dict[str, bytes]:
    """The bytes of a sample's members, by name."""
    members = {}
    for name, entry in group.entries.items():
        content = tar.extractfile(entry)
        assert content is not None  # regular files only, see groups_of
        members[name] = content.read()
    return members


def _image_size(tar: tarfile.TarFile, group: Group) -> tuple[int, int] | None:
    try:
        height, width, _ = decode(members_of(tar, group), with_masks=False).image.shape
    except BadSample:  # the stream counts it, verify names it
        return None
    return height, width
