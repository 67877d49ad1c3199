"""An ingest: what a source is, how its records become shards, and one pure call per piece of the work.

    job = Ingest(Folder("PHOTOS"), Framing(size=64))
    for piece in job.pieces():            # picklable; orchestration hands them to Ray
        written += piece.write("OUT")     # whole shards or nothing; a whole shard of the same input is kept
    job.finish("OUT", written)            # OUT/train/index.json, OUT/eval/index.json, last of all

The bytes are a function of the source's files and of the job's fields, not of how the pieces were spread.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.index import Index
from pipelines.ingest.picture import Framing
from pipelines.ingest.pieces import SETS, OneShard, Piece, Stripe, Written, cut
from pipelines.ingest.source import Source
from pipelines.shards import natural, write_index

__all__ = ["SETS", "Ingest", "Ingested", "Piece", "Written", "evenly_spaced", "ingest"]

_NAMED = 1000  # bad records that an index lists


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
            return [Stripe(self, records, stripe, workers) for stripe in range(workers)]
        records = records[: self.limit]
        if not records:
            raise DataError(
                f"{self.source.format}: there are no records in it; name the file or folder that holds them"
            )
        held_out = evenly_spaced(len(records), self.held_out).tolist()
        shards: list[Piece] = []
        for part in SETS:
            chosen = [
                record for record, held in zip(records, held_out, strict=True) if self.part_of(bool(held)) == part
            ]
            shards += [OneShard(self, part, number, run) for number, run in enumerate(cut(chosen, self.per_shard))]
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

    def part_of(self, held_out: bool) -> str:
        """The set that a record goes into."""
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
