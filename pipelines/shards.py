"""Write, index and verify a set of shards: a folder of plain WebDataset tars.

    000000.tar                  members as in `pipelines.samples`; equal samples give equal bytes
    000000.tar.offsets.json     where each sample begins, so that a reader can start in the middle
    index.json                  per shard: name, bytes, checksum, samples; written last

Everything is written under a temporary name and renamed, so a killed run leaves whole shards or nothing, and a folder
with an index.json is complete.
"""

import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pipelines.errors import DataError
from pipelines.index import Index, Shard
from pipelines.samples import BadSample, decode

# webdataset imports torch, so it is imported where it is used: reading an index takes no torch.

VERSION = 1
INDEX = "index.json"
_TEMPORARY = ".writing"


@dataclass(frozen=True)
class Sidecar:
    """What lies beside a shard.

    Fields:
        shard: the entry that goes into the index.
        size: (height, width) of the first readable image.
        offsets: `samples` + 1 byte positions: where each sample begins, and where the last one ends.
        source: what the shard was made from; a shard is kept only where this is equal.
    """

    shard: Shard
    size: tuple[int, int]
    offsets: tuple[int, ...]
    source: Mapping[str, Any]


# --- writing -----------------------------------------------------------------------------------------------------


def write_shard(
    folder: Path | str, name: str, samples: Iterable[Mapping[str, Any]], source: Mapping[str, Any] | None = None
) -> Shard:
    """Write one shard and its sidecar; equal samples give equal bytes.

    Args:
        folder: made if it is not there.
        name: file name, ending in .tar.
        samples: members by name and `__key__`, as `pipelines.samples.encode` makes them; at least one, keys distinct.
        source: what the samples are made from (JSON), for `kept_shard`.

    Raises:
        ValueError: no samples, a key that is not new, or the name does not end in .tar.
        DataError: no sample can be decoded.
    """
    from webdataset.writer import TarWriter

    folder = Path(folder)
    if not name.endswith(".tar"):
        raise ValueError(f"shard name: {name!r} does not end in .tar; add it")
    folder.mkdir(parents=True, exist_ok=True)
    keys: set[str] = set()
    with _replacing(folder / name) as file:
        # Fixed owner and time: the bytes are a function of the samples.
        with TarWriter(file, encoder=False, user="slotforge", group="slotforge", mtime=0) as writer:
            for sample in samples:
                key = sample["__key__"]
                if key in keys or "." in key or "/" in key:
                    raise ValueError(f"{name}: key {key!r} is taken or holds a dot or slash; use another")
                keys.add(key)
                writer.write(dict(sample))
        if not keys:
            raise ValueError(f"{name}: no samples; leave empty shards out of the set")
        file.flush()
        sidecar = scan(Path(file.name), name, source)
        # From here on an index of this folder would not tell the truth.
        (folder / INDEX).unlink(missing_ok=True)
        # The sidecar goes first: killed in between, it does not match the tar and the shard is written again.
        _write_sidecar(folder, sidecar)
    return sidecar.shard


def kept_shard(folder: Path | str, name: str, source: Mapping[str, Any]) -> Shard | None:
    """The shard of this name if it is whole, unchanged, and made from the same source; else None."""
    folder = Path(folder)
    try:
        sidecar = read_sidecar(folder, name)
        whole = sidecar.shard.name == name and sidecar.shard.sha256 == sha256_of(folder / name)
    except (DataError, FileNotFoundError):
        return None
    return sidecar.shard if whole and dict(sidecar.source) == json.loads(json.dumps(source)) else None


def write_index(folder: Path | str, shards: Iterable[Shard], about: Mapping[str, Any]) -> Index:
    """Complete a set: merge its shards' entries, in the given order, into index.json.

    Args:
        about: how the set was made (JSON), for people and for comparing with a recipe.

    Raises:
        DataError: a sidecar is missing or belongs to another shard, or the image sizes differ.
        ValueError: no shards, or two of one name.
    """
    folder = Path(folder)
    shards = tuple(shards)
    sizes: dict[tuple[int, int], str] = {}
    for shard in shards:
        sidecar = read_sidecar(folder, shard.name)
        if sidecar.shard != shard:
            raise DataError(f"{_sidecar_path(folder, shard.name)}: belongs to another shard; write {shard.name} again")
        sizes.setdefault(sidecar.size, shard.name)
    if len(sizes) > 1:
        found = ", ".join(f"{name} {height}x{width}" for (height, width), name in sizes.items())
        raise DataError(f"{folder}: image sizes differ ({found}); resize to one size, for example with ingest")
    index = Index(shards, size=next(iter(sizes), None), about=json.loads(json.dumps(about)))
    for leftover in folder.glob(f"*{_TEMPORARY}"):  # of killed runs: the set is complete, nobody writes any more
        leftover.unlink(missing_ok=True)
    content = {
        "version": VERSION,
        "digest": index.digest,
        "samples": index.num_samples,
        "size": index.size,
        "about": index.about,
        "shards": [asdict(shard) for shard in shards],
    }
    _write_json(folder / INDEX, content)
    return index


def index_folder(folder: Path | str, about: Mapping[str, Any] | None = None) -> Index:
    """Index an existing folder of WebDataset tars (*.tar, in natural order): sidecars and index.json beside them.

    Raises:
        DataError: there is no tar, or one is truncated, damaged or without a sample that can be decoded.
    """
    folder = Path(folder)
    tars = sorted(folder.glob("*.tar"), key=lambda path: natural(path.name))
    if not tars:
        raise DataError(f"{folder}: no *.tar in it; name the folder that holds the shards")
    shards = []
    for tar in tars:
        sidecar = scan(tar, tar.name)
        _write_sidecar(folder, sidecar)
        shards.append(sidecar.shard)
    return write_index(folder, shards, about or {"indexed": "existing WebDataset shards"})


# --- reading -----------------------------------------------------------------------------------------------------


def read_index(folder: Path | str) -> Index:
    """The index of a complete set.

    Raises:
        DataError: index.json is missing, unreadable, of another version, or does not match its own digest.
    """
    path = Path(folder) / INDEX
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise DataError(f"{path}: version {content['version']}, this reads {VERSION}; index the folder again")
        height, width = content["size"]
        shards = tuple(_shard(entry) for entry in content["shards"])
        index = Index(shards, size=(int(height), int(width)), about=content["about"])
        if content["digest"] != index.digest or content["samples"] != index.num_samples:
            raise DataError(f"{path}: its entries do not match its digest; index the folder again")
    except FileNotFoundError:
        raise DataError(f"{path}: not there; the set is not complete, make or index it first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an index ({type(error).__name__}: {error}); index the folder again") from error
    return index


def read_sidecar(folder: Path | str, name: str) -> Sidecar:
    """The sidecar of a shard.

    Raises:
        DataError: it is missing or not a sidecar.
    """
    path = _sidecar_path(Path(folder), name)
    try:
        content = json.loads(path.read_text())
        height, width = content["size"]
        sidecar = Sidecar(
            shard=_shard(content["shard"]),
            size=(int(height), int(width)),
            offsets=tuple(int(offset) for offset in content["offsets"]),
            source=dict(content["source"]),
        )
        if len(sidecar.offsets) != sidecar.shard.samples + 1:
            raise ValueError(f"{len(sidecar.offsets)} offsets for {sidecar.shard.samples} samples")
    except FileNotFoundError:
        raise DataError(f"{path}: not there; index the folder again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a sidecar ({type(error).__name__}: {error}); index the folder again") from error
    return sidecar


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
            groups, end = _groups(tar)
            size = next((size for group in groups if (size := _image_size(tar, group))), None)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{name}: not a whole WebDataset tar ({error}); copy or make it again") from error
    if size is None:
        raise DataError(f"{name}: none of its {len(groups)} samples has a readable image; leave it out of the set")
    return Sidecar(
        shard=Shard(name, path.stat().st_size, sha256_of(path), len(groups)),
        size=size,
        offsets=(*(group.offset for group in groups), end),
        source=json.loads(json.dumps(source or {})),
    )


def verify(folder: Path | str) -> list[str]:
    """Check every checksum, count and member of a set, reading all of it.

    Returns:
        One sentence per problem, each naming the file; empty when the set is good.
    """
    folder = Path(folder)
    try:
        index = read_index(folder)
    except DataError as error:
        return [str(error)]
    problems = []
    for shard in index.shards:
        problems += _verify_shard(folder, shard, index.size)
    listed = {shard.name for shard in index.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            problems.append(f"{path}: not in the index; remove it or index the folder again")
    return problems


def _verify_shard(folder: Path, shard: Shard, size: tuple[int, int] | None) -> list[str]:
    path = folder / shard.name
    if not path.is_file():
        return [f"{path}: missing"]
    if path.stat().st_size != shard.bytes:
        return [f"{path}: {path.stat().st_size} bytes, the index says {shard.bytes}"]
    if sha256_of(path) != shard.sha256:
        return [f"{path}: its checksum is not the one in the index"]
    problems = []
    try:
        with tarfile.open(path, "r:") as tar:
            groups, end = _groups(tar)
            if len(groups) != shard.samples:
                problems.append(f"{path}: {len(groups)} samples, the index says {shard.samples}")
            keys = [group.key for group in groups]
            problems += [f"{path}: key {key!r} comes twice" for key in sorted({k for k in keys if keys.count(k) > 1})]
            for group in groups:
                try:
                    members = _members(tar, group)
                    decode(members, with_masks=any(name.startswith("masks.") for name in members), size=size)
                except BadSample as error:
                    problems.append(f"{path}: {group.key}: {error}")
    except (tarfile.TarError, ValueError) as error:
        return [f"{path}: not a WebDataset tar ({error})"]
    try:
        sidecar = read_sidecar(folder, shard.name)
        if sidecar.shard != shard or sidecar.offsets != (*(group.offset for group in groups), end):
            problems.append(f"{_sidecar_path(folder, shard.name)}: does not match its shard; index the folder again")
    except DataError as error:
        problems.append(str(error))
    return problems


def sha256_of(path: Path) -> str:
    """Checksum of a file, read in one pass."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key in which `b10` follows `b9`."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


# --- inside ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """The members of one sample in a tar: its key, where it begins, and tar entries by member name."""

    key: str
    offset: int
    entries: Mapping[str, tarfile.TarInfo]


def _groups(tar: tarfile.TarFile) -> tuple[list[_Group], int]:
    """The samples of a tar, and where the last one ends, by webdataset's own rules of grouping."""
    from webdataset.tariterators import group_by_keys

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
        groups.append(_Group(sample["__key__"], offset, entries))
    return groups, end


def _members(tar: tarfile.TarFile, group: _Group) -> dict[str, bytes]:
    members = {}
    for name, entry in group.entries.items():
        content = tar.extractfile(entry)
        assert content is not None  # regular files only, see _groups
        members[name] = content.read()
    return members


def _image_size(tar: tarfile.TarFile, group: _Group) -> tuple[int, int] | None:
    try:
        height, width, _ = decode(_members(tar, group), with_masks=False).image.shape
    except BadSample:  # the stream counts it, verify names it
        return None
    return height, width


def _shard(entry: Mapping[str, Any]) -> Shard:
    return Shard(str(entry["name"]), int(entry["bytes"]), str(entry["sha256"]), int(entry["samples"]))


def _sidecar_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.offsets.json"


def _write_sidecar(folder: Path, sidecar: Sidecar) -> None:
    _write_json(_sidecar_path(folder, sidecar.shard.name), asdict(sidecar))


def _write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    with _replacing(path) as file:
        file.write(json.dumps(content, separators=(",", ":")).encode())


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and disappears when it does not."""
    # A name of its own for each writer: two that write one shard (a retry beside its stray) do not mix.
    prefix = f".{path.name}."
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, suffix=_TEMPORARY, delete=False) as file:
        try:
            os.fchmod(file.fileno(), 0o644)  # the default, 0600, would lock others out of a shared folder
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
