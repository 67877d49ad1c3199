"""An ingest: what a source is, how its records become shards, and one pure call per piece of the work.

    job = Ingest(Folder("PHOTOS"), Framing(size=64))
    for piece in job.pieces():            # picklable; orchestration hands them to Ray
        written += piece.write("OUT")     # whole shards or nothing; a whole shard of the same input is kept
    job.finish("OUT", written)            # OUT/train/index.json, OUT/eval/index.json, last of all

The bytes are a function of the source's files and of the job's fields, not of how the pieces were spread.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import DataError
from pipelines.index import Index, Shard
from pipelines.ingest.picture import BadRecord, Framing, Picture, members
from pipelines.shards import INDEX, kept_shard, natural, read_sidecar, write_index, write_shard

SETS = ("train", "eval")
_NAMED = 1000  # bad records that an index lists

_Reader = Callable[[Any], Iterable[Picture]]


@dataclass(frozen=True)
class Record:
    """What is taken or left as a whole: an image file, a scene, a video.

    Fields:
        number: its place in the source.
        name: names it to people: a file's path, a file's name and a record's number.
        content: what the source's reader needs; picklable.
        stamp: changes whenever the record does.
        samples: how many samples it holds.
    """

    number: int
    name: str
    content: Any
    stamp: str = ""
    samples: int = 1


class Unseen(Protocol):
    """Records of which nothing is known before they are read from the beginning. Picklable."""

    @property
    def stamp(self) -> str:
        """Changes whenever the files do."""
        ...

    def __iter__(self) -> Iterator[Record]:
        """The records in order; DataError where the file ends early or is damaged."""
        ...


class Source(Protocol):
    """A data set in somebody's format. Picklable; the same files give the same records in the same order."""

    @property
    def format(self) -> str:
        """Name of the format."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What else tells how the records are read (JSON), for the index; file names, but no folders."""
        ...

    def records(self) -> "Sequence[Record] | Unseen":
        """Every record in order, or what reads them one after the other.

        Raises:
            DataError: there is nothing to read, or the files do not hold together.
        """
        ...

    def reading(self) -> AbstractContextManager[_Reader]:
        """Opens what is needed; the function in it makes a record's content into pictures.

        It raises BadRecord, or any error of its codecs, where the record cannot be used.
        """
        ...


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


@dataclass(frozen=True)
class Ingested:
    """What became of a source.

    Fields:
        train: index of `out/train`; None where everything went to `eval`.
        held_out: index of `out/eval`; None where nothing was held out.
        left_out: the records that could not be used, with the reason.
    """

    train: Index | None
    held_out: Index | None
    left_out: tuple[str, ...]


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
class Ingest:
    """How a source becomes a training set and a held-out set.

    The held-out records are evenly spaced over the source's order, so that both sets see all of it. Records are cut
    into shards by their place, before any is read: a bad one leaves its shard one smaller.

    Fields:
        source: where the records come from.
        framing: how pictures are cut and resized.
        per_shard: samples in a shard; the last shard of a set may have fewer.
        held_out: share of the records for `eval`, in [0, 1): at least one record, unless it is 0.
        only: put everything into this one of the two sets instead.
        limit: take the first records only.
        skip_bad: leave bad records out and count them; else the first one stops the work.

    Raises:
        ValueError: a field is out of range.
    """

    source: Source
    framing: Framing = field(default_factory=Framing)
    per_shard: int = 1000
    held_out: float = 0.05
    only: str | None = None
    limit: int | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.per_shard < 1:
            raise ValueError(f"per_shard: {self.per_shard} is less than 1; use a positive number")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: {self.limit} is less than 1; use a positive number, or leave it out")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: {self.held_out} is not in [0, 1); use a share such as 0.05")
        if self.only is not None and self.only not in SETS:
            raise ValueError(f"only: {self.only!r} is not a set; use train or eval")

    def pieces(self, workers: int = 1) -> list[Piece]:
        """The work, in pieces that can run anywhere the source's files and the output folder are.

        A source whose records are known becomes one piece a shard. One that must be read from its beginning (GZIP)
        becomes `workers` pieces which each read all of it and make every `workers`-th shard: unpacking is repeated,
        decoding and encoding, which take longer, are not. A killed run unpacks again, and encodes only what is missing.

        Raises:
            DataError: the source has no records, or its files do not hold together.
        """
        records = self.source.records()
        if not isinstance(records, Sequence):
            return [_Stripe(self, records, stripe, workers) for stripe in range(workers)]
        records = records[: self.limit]
        if not records:
            raise DataError(
                f"{self.source.format}: there are no records in it; name the file or folder that holds them"
            )
        held_out = evenly_spaced(len(records), self.held_out)
        shards: list[Piece] = []
        for part in SETS:
            chosen = [record for record, held in zip(records, held_out, strict=True) if self._part(bool(held)) == part]
            shards += [_OneShard(self, part, number, cut) for number, cut in enumerate(_cut(chosen, self.per_shard))]
        return shards

    def finish(self, out: Path | str, written: Iterable[Written]) -> Ingested:
        """Complete the sets: write their index.json.

        Raises:
            DataError: a set has no usable record, its image sizes differ, or its folder holds other shards.
        """
        out = Path(out)
        in_order = sorted(written, key=lambda done: (SETS.index(done.part), done.number))
        indices: dict[str, Index] = {}
        for part in SETS:
            of_set = [done for done in in_order if done.part == part]
            shards = [done.shard for done in of_set if done.shard is not None]
            left_out = [line for done in of_set for line in done.left_out]
            if not shards and (of_set or part == (self.only or "train")):
                raise DataError(
                    f"{self.source.format}: no usable record for the {part} set ({len(left_out)} bad); "
                    "add records or change what is held out"
                )
            if not shards:
                continue
            listed = {shard.name for shard in shards}
            if foreign := sorted({path.name for path in (out / part).glob("*.tar")} - listed, key=natural):
                raise DataError(
                    f"{out / part}: holds {foreign[0]}, which is not a shard of this set ({len(foreign)} such files); "
                    "remove them or name another folder"
                )
            about = self.about | {"set": part, "left_out": len(left_out), "left_out_names": left_out[:_NAMED]}
            indices[part] = write_index(out / part, shards, about)
        return Ingested(indices.get("train"), indices.get("eval"), tuple(x for done in in_order for x in done.left_out))

    @property
    def about(self) -> dict[str, Any]:
        """How the sets are made, for their index."""
        fields = {"framing": asdict(self.framing), "held_out": self.held_out, "only": self.only, "limit": self.limit}
        return {"ingest": self.source.format, **self.source.facts, **fields}

    def _part(self, held_out: bool) -> str:
        return self.only or SETS[held_out]

    def source_of(self, part: str, number: int, stamp: str) -> dict[str, Any]:
        """What a shard is made from: it is kept only where this is equal."""
        place = {"set": part, "number": number, "per_shard": self.per_shard, "stamp": stamp, "skip_bad": self.skip_bad}
        return self.about | place


def ingest(job: Ingest, out: Path | str) -> Ingested:
    """Do all the work in this process.

    Args:
        out: gets the folders `train` and `eval`.

    Raises:
        DataError: as `Ingest.pieces`, `Piece.write` and `Ingest.finish`.
    """
    written = [done for piece in job.pieces() for done in piece.write(out)]
    return job.finish(out, written)


def evenly_spaced(count: int, share: float) -> NDArray[np.bool_]:
    """Which of `count` things to hold out: the middles of equal parts, bool [count]."""
    chosen = np.zeros(count, dtype=np.bool_)
    number = max(1, round(count * share)) if share else 0
    chosen[(2 * np.arange(number) + 1) * count // max(2 * number, 1)] = True
    return chosen


def file_stamp(path: Path) -> str:
    """Changes when a file does: its name, size and time of change."""
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


# --- inside ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OneShard:
    """A shard's records."""

    job: Ingest
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
class _Stripe:
    """Every `stripes`-th shard of a source that is read from its beginning."""

    job: Ingest
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
                part = job._part(_is_held_out(place, job.held_out))
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

    def __init__(self, job: Ingest, out: Path, part: str, number: int, stamp: str) -> None:
        self._place = (part, number)
        self._folder, self._name = out / part, f"{number:06d}.tar"
        self._source = job.source_of(part, number, stamp)
        self._kept = _kept(self._folder, self._name, self._source)
        self._samples: list[dict[str, Any]] = []
        self._left_out: list[str] = []
        self._job = job
        self._make: _Samples | None = None

    def add(self, read: _Reader, record: Record) -> None:
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

    def __init__(self, job: Ingest, read: _Reader, left_out: list[str]) -> None:
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


def _cut(records: Sequence[Record], per_shard: int) -> Iterator[list[Record]]:
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


def _is_held_out(place: int, share: float) -> bool:
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
    return write_shard(folder, name, _chain(first, samples), source, left_out)


def _chain(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest
