"""The small files of a set of shards: index.json, and a sidecar beside each tar. Written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pipelines.errors import DataError
from pipelines.index import Index, Shard

VERSION = 1
INDEX = "index.json"
TEMPORARY = ".writing"


@dataclass(frozen=True)
class Sidecar:
    """What lies beside a shard.

    Fields:
        shard: the entry that goes into the index.
        size: (height, width) of the first readable image.
        offsets: `samples` + 1 byte positions: where each sample begins, and where the last one ends.
        crc32: checksum of the bytes of each sample, for readers of single rows; empty where an older version did not
            record it.
        source: what the shard was made from; a shard is kept only where this is equal.
        masks: whether every sample has masks; None where an older version did not record it.
        left_out: what of the source could not be used, with the reason.
    """

    shard: Shard
    size: tuple[int, int]
    offsets: tuple[int, ...]
    source: Mapping[str, Any]
    masks: bool | None = None
    left_out: tuple[str, ...] = ()
    crc32: tuple[int, ...] = ()


def sidecar_path(folder: Path, name: str) -> Path:
    """Where the sidecar of a shard lies."""
    return folder / f"{name}.offsets.json"


# --- reading -----------------------------------------------------------------------------------------------------


def read_index(folder: Path | str) -> Index:
    """The index of a complete set.

    Raises:
        DataError: index.json is missing, unreadable, of another version, or does not match its own digest.
    """
    path = Path(folder) / INDEX
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: not there; the set is not complete, make or index it first") from None
    return parse_index(content, str(path))


def parse_index(data: bytes, name: str) -> Index:
    """The index in the bytes of an index.json.

    Args:
        name: path or address of the file, for messages.

    Raises:
        DataError: it is no index, of another version, or does not match its own digest.
    """
    with _understood(name, "an index"):
        content = json.loads(data)
        if content["version"] != VERSION:
            raise DataError(f"{name}: version {content['version']}, this reads {VERSION}; index the folder again")
        height, width = content["size"]
        shards = tuple(_shard(entry) for entry in content["shards"])
        index = Index(shards, size=(int(height), int(width)), about=content["about"])
        if content["digest"] != index.digest or content["samples"] != index.num_samples:
            raise DataError(f"{name}: its entries do not match its digest; index the folder again")
    return index


def read_sidecar(folder: Path | str, name: str) -> Sidecar:
    """The sidecar of a shard.

    Raises:
        DataError: it is missing or not a sidecar.
    """
    path = sidecar_path(Path(folder), name)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: not there; index the folder again") from None
    return parse_sidecar(content, str(path))


def parse_sidecar(data: bytes, name: str) -> Sidecar:
    """The sidecar in the bytes of its file.

    Args:
        name: path or address of the file, for messages.

    Raises:
        DataError: it is not a sidecar.
    """
    with _understood(name, "a sidecar"):
        content = json.loads(data)
        height, width = content["size"]
        sidecar = Sidecar(
            shard=_shard(content["shard"]),
            size=(int(height), int(width)),
            offsets=tuple(int(offset) for offset in content["offsets"]),
            source=dict(content["source"]),
            masks=content.get("masks"),
            left_out=tuple(str(line) for line in content.get("left_out", ())),
            crc32=tuple(int(sum) for sum in content.get("crc32", ())),
        )
        if len(sidecar.offsets) != sidecar.shard.samples + 1:
            raise ValueError(f"{len(sidecar.offsets)} offsets for {sidecar.shard.samples} samples")
        if len(sidecar.crc32) not in (0, sidecar.shard.samples):
            raise ValueError(f"{len(sidecar.crc32)} checksums for {sidecar.shard.samples} samples")
    return sidecar


# --- writing -----------------------------------------------------------------------------------------------------


def write_sidecar(folder: Path, sidecar: Sidecar) -> None:
    """The sidecar, beside its shard."""
    write_json(sidecar_path(folder, sidecar.shard.name), asdict(sidecar))


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and disappears when it does not."""
    # A name of its own for each writer: two that write one shard (a retry beside its stray) do not mix.
    prefix = f".{path.name}."
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, suffix=TEMPORARY, delete=False) as file:
        try:
            os.fchmod(file.fileno(), 0o644)  # the default, 0600, would lock others out of a shared folder
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A small file of JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(content, separators=(",", ":")).encode())


# --- inside ------------------------------------------------------------------------------------------------------


@contextmanager
def _understood(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name}: not {what} ({type(error).__name__}: {error}); index the folder again") from error


def _shard(entry: Mapping[str, Any]) -> Shard:
    return Shard(str(entry["name"]), int(entry["bytes"]), str(entry["sha256"]), int(entry["samples"]))
