"""Windows of a plan, read from shards wherever they lie, and a verdict on each sample.

Permanent faults of content become `Fault`s, the same for every reader. Anything else that goes wrong while reading is
transient: it is tried again, then stops the run with the shard's name, and never changes a batch.

What every reader finds alike is the storage as it is. A shard that changes or goes away while readers run could be good
to those that have read it and bad to the others, so whoever has found it good stops with its name, and fills nothing.
Those that start after that agree again. (A reader that meets such a shard for the first time cannot know that it was
good, and a copy in a cache stays good.)
"""

import hashlib
import io
import logging
import os
import shutil
import tarfile
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from webdataset.tariterators import group_by_keys, tar_file_expander

from pipelines.cache import Cache, NoRoomError
from pipelines.errors import ContentError, DataError, TransientError
from pipelines.order import Order, Piece, Window
from pipelines.samples import IMAGE_MEMBERS, MASK_MEMBERS
from pipelines.sets import fetch_sidecar
from pipelines.shards import Sidecar, scan
from pipelines.sources import AbsentError, ChangedError, Sources, Version, join, local_path, shown
from pipelines.tars import Raw, rows

logger = logging.getLogger(__name__)

_MISMATCH = "the shard's checksum is not the one in its index"


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a sample can never be used."""

    reason: str


class _Cut(NamedTuple):
    """The bytes of a piece, and where its rows begin in them and the last one ends."""

    content: bytes
    offsets: tuple[int, ...]

    def sums(self) -> tuple[int, ...]:
        """CRC-32 of each row."""
        return tuple(zlib.crc32(self.content[begin:end]) for begin, end in pairwise(self.offsets))


class Reader:
    """Holds the newest window of every open lane, undecoded.

    A shard is compared with its checksum as a whole before any of it is used: a verdict must not depend on who reads
    which part. On this machine and in the cache its rows are then read alone. Elsewhere, without a cache, it comes
    whole the first time, and by ranges after that, as long as the storage says that it is still the same and each row
    matches the checksum in its sidecar.

    Args:
        plan: of the set.
        folder: address of the folder that holds the shards, unless the index knows.
        with_masks: read the masks too.
        sources: reads files by address.
        cache: for shards that are not on this machine.
    """

    def __init__(self, plan: Order, folder: str, with_masks: bool, sources: Sources, cache: Cache | None) -> None:
        self._plan = plan
        self._folder = folder
        self._sources = sources
        self._cache = cache
        self._members = {*IMAGE_MEMBERS, "json", *(MASK_MEMBERS if with_masks else ())}
        self._windows: dict[int, tuple[Window, dict[int, Raw | Fault]]] = {}  # by lane
        self._checked: dict[int, Fault | Version] = {}  # by shard: bad, or the version that was found good
        self._sidecars: OrderedDict[int, Sidecar] = OrderedDict()  # of the open windows' shards
        self._most_sidecars = 2 * plan.lanes * (plan.window * plan.parts + 1)

    def window(self, window: Window) -> Mapping[int, Raw | Fault]:
        """Every sample of a window by its number in the set; it takes the place of its lane's window before."""
        held = self._windows.get(window.lane)
        if held is None or held[0] != window:
            self._windows.pop(window.lane, None)  # let go of the old one before the new one is read
            samples: dict[int, Raw | Fault] = {}
            for piece in self._plan.pieces(window):
                first = int(self._plan.index.offsets[piece.shard]) + piece.first
                samples.update(enumerate(self._piece(piece), start=first))
            held = self._windows[window.lane] = (window, samples)
        return held[1]

    def keep(self, lanes: set[int]) -> None:
        """Let go of the windows of all other lanes."""
        for lane in set(self._windows) - lanes:
            del self._windows[lane]

    def _piece(self, piece: Piece) -> list[Raw | Fault]:
        """Exactly `last - first` samples or faults."""
        url, count = self._url(piece.shard), piece.last - piece.first
        known = self._checked.get(piece.shard)
        if isinstance(known, Fault):
            return [known] * count
        try:
            cut = self._sources.retried(url, lambda: self._rows(piece))
            samples: list[Raw | Fault] = list(rows(*cut, self._members) or self._parsed(url, cut.content))
        except (ContentError, AbsentError) as error:
            reason = "the shard is not there" if isinstance(error, AbsentError) else str(error)
            if known is not None:
                raise DataError(
                    f"{shown(url)}: {reason}, and it was good before in this run: it changed meanwhile. Put it back, "
                    "or have its samples replaced from the last checkpoint on: start again"
                ) from error
            logger.warning("%s: %s; its samples are replaced", shown(url), reason)
            self._checked[piece.shard] = fault = Fault(reason)
            return [fault] * count
        except (tarfile.TarError, ValueError) as error:
            raise DataError(f"{shown(url)}: does not match its offsets ({error}); index the folder again") from error
        if len(samples) != count:
            raise DataError(
                f"{shown(url)}: {len(samples)} samples in rows {piece.first} to {piece.last}; index the folder again"
            )
        return samples

    def _parsed(self, url: str, content: bytes) -> Iterator[Raw]:
        """The samples in a piece of a tar that is not plain, by webdataset's own tar iteration and grouping."""
        source = [{"url": shown(url), "stream": io.BytesIO(content)}]
        # No handler is given, so webdataset raises where it could skip. Unwanted members go after the grouping: without
        # any member a sample would vanish and shift the rows behind it.
        for sample in group_by_keys(tar_file_expander(source)):
            yield Raw(sample["__key__"], {name: data for name, data in sample.items() if name in self._members})

    # --- bytes ---------------------------------------------------------------------------------------------------

    def _rows(self, piece: Piece) -> _Cut:
        """The bytes of a piece, of a shard that matches its checksum."""
        url = self._url(piece.shard)
        if (path := local_path(url)) is not None:
            return self._from_folder(piece, path)
        if self._cache is not None:
            shard = self._plan.index.shards[piece.shard]
            try:
                with self._cache.shard(url, shard.sha256, shard.bytes, lambda file: self._save(piece, file)) as file:
                    self._checked.setdefault(piece.shard, Version(shard.bytes))
                    return self._cut(piece, file)
            except NoRoomError as error:
                logger.warning("%s: read without the cache: %s", shown(url), error)
        return self._from_afar(piece, url)

    def _from_folder(self, piece: Piece, path: Path) -> _Cut:
        shard = self._plan.index.shards[piece.shard]
        if not path.parent.is_dir():  # a folder that is not mounted says nothing about its shards
            raise NotADirectoryError(f"{path.parent} is not there")
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise AbsentError(str(path)) from None
        with file:
            status = os.fstat(file.fileno())
            version = Version(status.st_size, str(status.st_mtime_ns))
            if self._checked.get(piece.shard) != version:
                _check_size(version.size, shard.bytes)
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    raise ContentError(_MISMATCH)
                self._checked[piece.shard] = version
            return self._cut(piece, file)

    def _from_afar(self, piece: Piece, url: str) -> _Cut:
        shard = self._plan.index.shards[piece.shard]
        version = self._checked.get(piece.shard)
        if isinstance(version, Version) and (cut := self._from_range(piece, url, version)) is not None:
            return cut
        for _ in range(2):  # once more: the way here may be at fault
            whole = bytearray(shard.bytes)

            def write(position: int, data: bytes, whole: bytearray = whole) -> None:
                whole[position : position + len(data)] = data

            version = self._sources.fetch(url, shard.bytes, write)
            _check_size(version.size, shard.bytes)
            if hashlib.sha256(whole).hexdigest() == shard.sha256:
                self._checked[piece.shard] = version
                return self._cut(piece, io.BytesIO(whole))
        raise ContentError(_MISMATCH)

    def _from_range(self, piece: Piece, url: str, version: Version) -> _Cut | None:
        """The bytes of a piece of a shard that was found good; None where it has to be read whole."""
        if not (version.tag and version.ranges):
            return None
        try:
            sidecar = self._sidecar(piece.shard, None)
            if not sidecar.crc32:
                return None
            begin, end = sidecar.offsets[piece.first], sidecar.offsets[piece.last]
            cut = _Cut(self._sources.read_range(url, begin, end, version), _relative(sidecar.offsets, piece))
        except ChangedError:
            logger.warning("%s: changed since it was checked; it is checked again", shown(url))
            return None
        if cut.sums() != sidecar.crc32[piece.first : piece.last]:
            logger.warning("%s: a part of it came damaged; it is checked again", shown(url))
            return None
        return cut

    def _save(self, piece: Piece, file: BinaryIO) -> None:
        shard = self._plan.index.shards[piece.shard]
        version = self._sources.fetch(self._url(piece.shard), shard.bytes, _writer(file))
        _check_size(version.size, shard.bytes)

    def _cut(self, piece: Piece, file: BinaryIO) -> _Cut:
        offsets = self._sidecar(piece.shard, file).offsets
        file.seek(offsets[piece.first])
        return _Cut(file.read(offsets[piece.last] - offsets[piece.first]), _relative(offsets, piece))

    def _sidecar(self, number: int, file: BinaryIO | None) -> Sidecar:
        """Where each row of a shard begins, and the last one ends; `file` is the whole shard, found good."""
        if number not in self._sidecars:
            self._sidecars[number] = self._found_sidecar(number, file)
            if len(self._sidecars) > self._most_sidecars:
                self._sidecars.popitem(last=False)
        self._sidecars.move_to_end(number)
        return self._sidecars[number]

    def _found_sidecar(self, number: int, file: BinaryIO | None) -> Sidecar:
        shard, folder = self._plan.index.shards[number], self._home(number)
        try:
            sidecar = fetch_sidecar(folder, shard.name, self._sources)
            if sidecar.shard != shard:
                raise DataError(f"{shard.name}: its sidecar belongs to another shard")
        except TransientError:
            raise
        except DataError as error:
            # Only a short cut is lost: the offsets follow from the tar, which is known to be good.
            if file is None:
                raise ChangedError(shard.name) from error
            logger.warning("%s; scanning the shard instead", error)
            sidecar = _scanned(file, shard.name)
            if sidecar.shard != shard:
                raise DataError(
                    f"{shown(self._url(number))}: {sidecar.shard.samples} samples, the index says {shard.samples}; "
                    "index the folder again"
                ) from None
        return sidecar

    def _url(self, number: int) -> str:
        return join(self._home(number), self._plan.index.shards[number].name)

    def _home(self, number: int) -> str:
        folders = self._plan.index.folders
        return folders[number] if folders else self._folder


def _relative(offsets: tuple[int, ...], piece: Piece) -> tuple[int, ...]:
    return tuple(offset - offsets[piece.first] for offset in offsets[piece.first : piece.last + 1])


def _check_size(size: int | None, expected: int) -> None:
    if size is not None and size != expected:
        raise ContentError(f"the shard has {size} bytes, its index says {expected}")


def _writer(file: BinaryIO) -> Callable[[int, bytes], None]:
    def write(position: int, data: bytes) -> None:
        while data:
            done = os.pwrite(file.fileno(), data, position)
            position, data = position + done, data[done:]

    return write


def _scanned(file: BinaryIO, name: str) -> Sidecar:
    with tempfile.NamedTemporaryFile(suffix=".tar") as copy:
        file.seek(0)
        shutil.copyfileobj(file, copy)
        copy.flush()
        return scan(Path(copy.name), name)
