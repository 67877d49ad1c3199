"""The pieces of an ingest: what one worker does. Whole shards or nothing; a whole shard of the same input is kept."""

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from pipelines.errors import DataError
from pipelines.index import Shard
from pipelines.ingest.picture import BadRecord, members
from pipelines.ingest.source import Reader, Record, Unseen
from pipelines.shards import INDEX, kept_shard, read_sidecar, write_shard

if TYPE_CHECKING:
    from pipelines.ingest.job import Ingest

SETS = ("train", "eval")


@dataclass(frozen=True)
class Written:
    """A shard that is there now.

    Fields:
        part: `train` or `eval`.
        number: of the shard in its set.
        shard: its entry in the index; None where every record of it was bad.
        left_out: the bad records, each with the reason.
    """

    part: str
    number: int
    shard: Shard | None
    left_out: tuple[str, ...] = ()


class Piece(Protocol):
    """A part of the work, for one worker."""

    @property
    def samples(self) -> int | None:
        """About how many samples it makes; None where nobody knows yet."""
        ...

    def write(self, out: Path | str) -> Iterator[Written]:
        """Write the shards of this piece that are not there yet, one after the other.

        Raises:
            DataError: a bad record, named, where they are not skipped; images differ in size; a file cannot be read.
        """
        ...


@dataclass(frozen=True)
class OneShard:
    """A shard's records."""

    job: "Ingest"
    part: str
    number: int
    records: Sequence[Record]

    @property
    def samples(self) -> int | None:
        return sum(record.samples for record in self.records)

    def write(self, out: Path | str) -> Iterator[Written]:
        folder, name = Path(out) / self.part, f"{self.number:06d}.tar"
        stamps = json.dumps([[record.number, record.name, record.stamp] for record in self.records])
        source = self.job.source_of(self.part, self.number, hashlib.sha256(stamps.encode()).hexdigest())
        if kept := _kept(folder, name, source):
            yield Written(self.part, self.number, *kept)
            return
        left_out: list[str] = []
        with self.job.source.reading() as read:
            samples = _Samples(self.job, read, left_out)
            made = (sample for record in self.records for sample in samples.of(record))
            yield Written(self.part, self.number, _write(folder, name, made, source, left_out), tuple(left_out))


@dataclass(frozen=True)
class Stripe:
    """Every `stripes`-th shard of a source that is read from its beginning."""

    job: "Ingest"
    records: Unseen
    stripe: int
    stripes: int

    @property
    def samples(self) -> int | None:
        return None if self.job.limit is None else self.job.limit // self.stripes

    def write(self, out: Path | str) -> Iterator[Written]:
        job, seen = self.job, dict.fromkeys(SETS, 0)
        unfinished: dict[str, _Growing] = {}
        with job.source.reading() as read:
            for place, record in enumerate(islice(self.records, job.limit)):
                part = job.part_of(is_held_out(place, job.held_out))
                number, row = divmod(seen[part], job.per_shard)
                seen[part] += 1
                if number % self.stripes != self.stripe:
                    continue
                if row == 0:
                    unfinished[part] = _Growing(job, Path(out), part, number, self.records.stamp)
                unfinished[part].add(read, record)
                if row == job.per_shard - 1:
                    yield unfinished.pop(part).written()
        for growing in unfinished.values():
            yield growing.written()


class _Growing:
    """A shard in the making. Its samples wait in memory, encoded, for as long as the two sets grow side by side."""

    def __init__(self, job: "Ingest", out: Path, part: str, number: int, stamp: str) -> None:
        self._place = (part, number)
        self._folder, self._name = out / part, f"{number:06d}.tar"
        self._source = job.source_of(part, number, stamp)
        self._kept = _kept(self._folder, self._name, self._source)
        self._samples: list[dict[str, Any]] = []
        self._left_out: list[str] = []
        self._job = job
        self._make: _Samples | None = None

    def add(self, read: Reader, record: Record) -> None:
        if self._kept is None:
            self._make = self._make or _Samples(self._job, read, self._left_out)
            self._samples += self._make.of(record)

    def written(self) -> Written:
        if self._kept is not None:
            return Written(*self._place, *self._kept)
        shard = _write(self._folder, self._name, iter(self._samples), self._source, self._left_out)
        return Written(*self._place, shard, tuple(self._left_out))


class _Samples:
    """Makes records into samples of one size, and notes those that cannot be used."""

    def __init__(self, job: "Ingest", read: Reader, left_out: list[str]) -> None:
        self._job, self._read, self._left_out = job, read, left_out
        self._first: tuple[tuple[int, ...], str] | None = None

    def of(self, record: Record) -> list[dict[str, Any]]:
        """The samples of a record: all of them, or none if one of them is bad."""
        key = f"{record.number:08d}"
        try:
            pictures = [self._job.framing(picture) for picture in self._read(record.content)]
            keys = (
                [key]
                if record.samples == 1 and len(pictures) == 1
                else [f"{key}-{i:04d}" for i in range(len(pictures))]
            )
            made = [members(key, record.name, picture) for key, picture in zip(keys, pictures, strict=True)]
        except (BadRecord, OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error) as error:
            return self._bad(record, error)
        except Image.DecompressionBombError as error:
            return self._bad(record, error)
        for picture in pictures:
            self._same_size(record, picture.image.shape[:2])
        return made

    def _bad(self, record: Record, error: Exception) -> list[dict[str, Any]]:
        reason = f"{record.name}: {error}"
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            # The storage's fault says nothing about the record: leaving it out would be wrong.
            raise DataError(f"{reason}; repair the storage and say the same again") from error
        if not self._job.skip_bad:
            raise BadRecord(f"{reason}; mend or remove it, or leave bad records out with --skip-bad") from error
        self._left_out.append(reason)
        return []

    def _same_size(self, record: Record, size: tuple[int, ...]) -> None:
        self._first = self._first or (size, record.name)
        if size != self._first[0]:
            (height, width), name = self._first
            raise DataError(
                f"{record.name}: {size[0]}x{size[1]} pixels, but {name} has {height}x{width}; all images of a set are "
                "of one size: give --size"
            )


def cut(records: Sequence[Record], per_shard: int) -> Iterator[list[Record]]:
    """Runs of records with at most `per_shard` samples, and at least one record."""
    run: list[Record] = []
    samples = 0
    for record in records:
        if run and samples + record.samples > per_shard:
            yield run
            run, samples = [], 0
        run.append(record)
        samples += record.samples
    if run:
        yield run


def is_held_out(place: int, share: float) -> bool:
    """Evenly spaced without knowing how many there will be: whether the rounded share grows by one here."""
    return int((place + 1) * share + 0.5) > int(place * share + 0.5)


def _kept(folder: Path, name: str, source: Mapping[str, Any]) -> tuple[Shard, tuple[str, ...]] | None:
    shard = kept_shard(folder, name, source)
    return None if shard is None else (shard, read_sidecar(folder, name).left_out)


def _write(
    folder: Path, name: str, samples: Iterator[dict[str, Any]], source: Mapping[str, Any], left_out: Sequence[str]
) -> Shard | None:
    first = next(samples, None)  # a shard needs one
    if first is None:
        for stale in (folder / INDEX, folder / name):  # of another input
            stale.unlink(missing_ok=True)
        return None
    return write_shard(folder, name, chain([first], samples), source, left_out)
