"""Write, index and verify a set of shards: a folder of plain WebDataset tars.

    000000.tar                  members as in `pipelines.samples`; equal samples give equal bytes
    000000.tar.offsets.json     where each sample begins, so that a reader can start in the middle
    index.json                  per shard: name, bytes, checksum, samples; written last

Everything is written under a temporary name and renamed, so a killed run leaves whole shards or nothing, and a folder
with an index.json is complete.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from pipelines.errors import DataError
from pipelines.index import Index, Shard
from pipelines.samples import IMAGE_MEMBERS, MASK_MEMBERS, BadSample, decode

# webdataset imports torch, so it is imported where it is used: reading an index takes no torch.

VERSION = 1
INDEX = "index.json"
INDEXED = {"indexed": "existing WebDataset shards"}
_TEMPORARY = ".writing"


@dataclass(frozen=True)
class Sidecar:
    """What lies beside a shard.

    Fields:
        shard: the entry that goes into the index.
        size: (height, width) of the first readable image.
        offsets: `samples` + 1 byte positions: where each sample begins, and where the last one ends.
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


# --- writing -----------------------------------------------------------------------------------------------------


def write_shard(
    folder: Path | str,
    name: str,
    samples: Iterable[Mapping[str, Any]],
    source: Mapping[str, Any] | None = None,
    left_out: Sequence[str] = (),
) -> Shard:
    """Write one shard and its sidecar; equal samples give equal bytes.

    Args:
        folder: made if it is not there.
        name: file name, ending in .tar.
        samples: members by name and `__key__`, as `pipelines.samples.encode` makes them; at least one, keys distinct.
        source: what the samples are made from (JSON), for `kept_shard`.
        left_out: recorded in the sidecar; looked at when all samples are written, so that making them may add to it.

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
        sidecar = replace(scan(Path(file.name), name, source), left_out=tuple(left_out))
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
        about: how the set was made (JSON), for people and for comparing with a recipe. Whether every sample has masks
            is added as `masks`: what lies in the shards counts, whatever `about` says.

    Raises:
        DataError: a sidecar is missing or belongs to another shard, or the image sizes differ.
        ValueError: no shards, or two of one name.
    """
    folder = Path(folder)
    shards = tuple(shards)
    sizes: dict[tuple[int, int], str] = {}
    masks: list[bool | None] = []
    for shard in shards:
        sidecar = read_sidecar(folder, shard.name)
        if sidecar.shard != shard:
            raise DataError(f"{_sidecar_path(folder, shard.name)}: belongs to another shard; write {shard.name} again")
        sizes.setdefault(sidecar.size, shard.name)
        masks.append(sidecar.masks)
    if len(sizes) > 1:
        found = ", ".join(f"{name} {height}x{width}" for (height, width), name in sizes.items())
        raise DataError(f"{folder}: image sizes differ ({found}); resize to one size, for example with ingest")
    known = {} if None in masks else {"masks": all(masks)}
    index = Index(shards, size=next(iter(sizes), None), about=json.loads(json.dumps({**about, **known})))
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
    return write_index(folder, [index_shard(folder, name) for name in tar_names(folder)], about or INDEXED)


def index_shard(folder: Path | str, name: str) -> Shard:
    """Write the sidecar of an existing tar: the part of `index_folder` that can be spread over workers.

    Raises:
        DataError: it is truncated, damaged or without a sample that can be decoded.
    """
    folder = Path(folder)
    sidecar = scan(folder / name, name)
    with contextlib.suppress(DataError):  # what made the tar stays known for as long as the tar is the same
        before = read_sidecar(folder, name)
        if before.shard == sidecar.shard:
            sidecar = replace(sidecar, source=before.source, left_out=before.left_out)
    _write_sidecar(folder, sidecar)
    return sidecar.shard


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
    try:
        content = json.loads(data)
        if content["version"] != VERSION:
            raise DataError(f"{name}: version {content['version']}, this reads {VERSION}; index the folder again")
        height, width = content["size"]
        shards = tuple(_shard(entry) for entry in content["shards"])
        index = Index(shards, size=(int(height), int(width)), about=content["about"])
        if content["digest"] != index.digest or content["samples"] != index.num_samples:
            raise DataError(f"{name}: its entries do not match its digest; index the folder again")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name}: not an index ({type(error).__name__}: {error}); index the folder again") from error
    return index


def read_sidecar(folder: Path | str, name: str) -> Sidecar:
    """The sidecar of a shard.

    Raises:
        DataError: it is missing or not a sidecar.
    """
    path = _sidecar_path(Path(folder), name)
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
    try:
        content = json.loads(data)
        height, width = content["size"]
        sidecar = Sidecar(
            shard=_shard(content["shard"]),
            size=(int(height), int(width)),
            offsets=tuple(int(offset) for offset in content["offsets"]),
            source=dict(content["source"]),
            masks=content.get("masks"),
            left_out=tuple(str(line) for line in content.get("left_out", ())),
        )
        if len(sidecar.offsets) != sidecar.shard.samples + 1:
            raise ValueError(f"{len(sidecar.offsets)} offsets for {sidecar.shard.samples} samples")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name}: not a sidecar ({type(error).__name__}: {error}); index the folder again") from error
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
        masks=all("masks" in kinds(group.entries) for group in groups),
    )


def verify(folder: Path | str) -> list[str]:
    """Check every checksum, count and member of a set, reading all of it.

    Returns:
        One sentence per problem, each naming the file; empty when the set is good.
    """
    try:
        index = read_index(folder)
    except DataError as error:
        return [str(error)]
    expected = expected_kinds(folder, index)
    problems = [problem for shard in index.shards for problem in verify_shard(folder, shard, index.size, expected)]
    return problems + unlisted(folder, index)


def verify_shard(
    folder: Path | str, shard: Shard, size: tuple[int, int] | None, expected: frozenset[str] | None = None
) -> list[str]:
    """Check one shard of a set: the part of `verify` that can be spread over workers.

    Args:
        shard: its entry in the index.
        size: of every image.
        expected: which of image, masks and json every sample must have; None leaves it open.

    Returns:
        One sentence per problem.
    """
    folder = Path(folder)
    path = folder / shard.name
    try:
        if path.stat().st_size != shard.bytes:
            return [f"{path}: {path.stat().st_size} bytes, the index says {shard.bytes}; copy or make it again"]
        if sha256_of(path) != shard.sha256:
            return [f"{path}: its checksum is not the one in the index; copy or make it again"]
    except FileNotFoundError:
        return [f"{path}: missing; copy or make it again"]
    except OSError as error:
        return [f"{path}: cannot be read ({error})"]
    problems = []
    try:
        with tarfile.open(path, "r:") as tar:
            groups, end = _groups(tar)
            if len(groups) != shard.samples:
                problems.append(f"{path}: {len(groups)} samples, the index says {shard.samples}")
            counts = Counter(group.key for group in groups)
            problems += [f"{path}: key {key!r} comes {count} times" for key, count in counts.items() if count > 1]
            for group in groups:
                problems += [f"{path}: {group.key}: {problem}" for problem in _check(tar, group, size, expected)]
    except (tarfile.TarError, ValueError) as error:
        return [f"{path}: not a WebDataset tar ({error})"]
    try:
        sidecar = read_sidecar(folder, shard.name)
        if sidecar.shard != shard or sidecar.offsets != (*(group.offset for group in groups), end):
            problems.append(f"{_sidecar_path(folder, shard.name)}: does not match its shard; index the folder again")
    except DataError as error:
        problems.append(str(error))
    return problems


def unlisted(folder: Path | str, index: Index) -> list[str]:
    """A sentence for each tar of the folder that its index does not know."""
    listed = {shard.name for shard in index.shards}
    tars = (path for path in sorted(Path(folder).glob("*.tar")) if path.name not in listed)
    return [f"{path}: not in the index; remove it or index the folder again" for path in tars]


def expected_kinds(folder: Path | str, index: Index) -> frozenset[str] | None:
    """Which of image, masks and json the samples of a set have, judged by its first; None where that is unreadable.

    An index that says whether every sample has masks is believed; without the promise, some may have them.
    """
    try:
        with tarfile.open(Path(folder) / index.shards[0].name, "r:") as tar:
            first = kinds(_groups(tar)[0][0].entries)
    except (OSError, tarfile.TarError, ValueError, IndexError):
        return None
    masks = index.about.get("masks")
    return first | {"masks"} if masks else first - {"masks"} if masks is False else first


def kinds(members: Iterable[str]) -> frozenset[str]:
    """Which of image, masks and json are among the members' names."""
    known = {"json": "json"} | dict.fromkeys(IMAGE_MEMBERS, "image") | dict.fromkeys(MASK_MEMBERS, "masks")
    return frozenset(known[name] for name in members if name in known)


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
            part = file.read(offsets[row + 1] - offsets[row])
        with tarfile.open(fileobj=io.BytesIO(part + bytes(2 * tarfile.BLOCKSIZE)), mode="r:") as tar:
            (group,), _ = _groups(tar)
            return group.key, _members(tar, group)
    except (OSError, IndexError, tarfile.TarError, ValueError) as error:
        raise DataError(f"{folder / name}: row {row} cannot be read ({error}); verify the set") from error


def scan_samples(path: Path) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, (byte position, bytes) by member name) of every sample of a tar, by webdataset's own rules of grouping.

    Raises:
        DataError: it cannot be read, is truncated or damaged.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            groups, _ = _groups(tar)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(f"{path}: not a whole WebDataset tar ({error}); copy or make it again") from error
    return [
        (group.key, {name: (entry.offset_data, entry.size) for name, entry in group.entries.items()})
        for group in groups
    ]


def _check(
    tar: tarfile.TarFile, group: "_Group", size: tuple[int, int] | None, expected: frozenset[str] | None
) -> list[str]:
    found = kinds(group.entries)
    try:
        decode(_members(tar, group), with_masks="masks" in found, size=size)
    except BadSample as error:
        return [str(error)]
    if missing := sorted((expected or frozenset()) - found):
        return [f"no {' and no '.join(missing)}, which other samples of the set have; make the shard again"]
    if "json" in found and expected is not None and "json" not in expected:
        return ["it has json, which other samples of the set do not have; make the shard again"]
    return []


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
