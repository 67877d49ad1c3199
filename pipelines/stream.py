"""From a plan to batches: every step of a run as micro batches of one shape, read ahead by a thread."""

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import DataError
from pipelines.noise import Purpose, gumbel, normal
from pipelines.plan import Plan, Span, micro_batches
from pipelines.reader import Fault, Reader
from pipelines.samples import BadSample, Sample, decode
from pipelines.transforms import to_model

__all__ = ["Ledger", "MicroBatch", "Stream"]

logger = logging.getLogger(__name__)

Ledger = Callable[[int, int, int, int, int], None]
"""Called with (step, rank, place, sample, replaced): `replaced` is the bad sample whose place it fills, or -1."""


@dataclass(frozen=True)
class MicroBatch:
    """m samples of a step. Where a slice does not fill its micro batches, a sample is repeated with weight 0.

    Fields:
        images: float32 [m, 3, H, W] in [-1, 1].
        weight: float32 [m], 1 for a sample of the batch, 0 for padding.
        slot_noise: float32 [m, ...] standard normal, or None.
        gate_noise: float32 [m, ...] standard Gumbel, or None.
        num_objects: int64 [m], -1 where unknown.
        masks: int64 [m, H, W], 0 is background, or None.
        ids: int64 [m], number of the sample in the set.
        places: int64 [m], place in the step's batch.
    """

    images: Tensor
    weight: Tensor
    slot_noise: Tensor | None
    gate_noise: Tensor | None
    num_objects: Tensor
    masks: Tensor | None
    ids: Tensor
    places: Tensor

    def to(self, device: torch.device | str) -> Self:
        """The same micro batch on a device."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A sample at its place; `replaced` is the bad sample whose place it fills, or -1."""

    place: int
    number: int
    replaced: int
    sample: Sample


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that is ready, or the error that its making met."""

    number: int
    micro_batches: list[MicroBatch]
    entries: list[_Entry]
    error: BaseException | None = None


class Stream:
    """A rank's share of a set of shards, step by step.

    Steps are usually asked for one after the other and are made ahead of time; any other step seeks, which reads at
    most one window per open lane. A sample with a permanent fault (its shard is gone or does not match its checksum, a
    member is missing, cannot be decoded or has the wrong size) is replaced by the next good one of its window: the same
    for every world size, logged once, and listed in `bad`.

    Args:
        plan: order of the set; its index must come from shards (it knows the image size).
        folder: holds the shards.
        rank, world: this reader and how many there are.
        micro_batch: the most samples a micro batch may have.
        seed: of the noise.
        noise: shape of one sample's noise by name: `slots` (normal), `gate` (Gumbel). What is left out is None.
        with_masks: decode masks; a sample without them is bad.
        prefetch: steps made ahead of time.
        bad_limit: the most bad samples this reader accepts; by default 1 % of the set, at least 10.
        ledger: a file to which a line `step rank place sample replaced` is appended for each sample handed out, or a
            `Ledger`; one per rank. Padding is not recorded.
        memory_limit: bytes that the open windows may take.

    Attributes:
        num_micro_batches, micro_batch: A and m; every step is A micro batches of m samples.
        bad: reason by number of each bad sample met so far.
        waited: seconds that `step` has spent waiting for data.

    Raises:
        ValueError: an argument is out of range, or the open windows would take more than the memory limit.
        DataError: the folder is not there.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path | str,
        *,
        rank: int,
        world: int,
        micro_batch: int,
        seed: int,
        noise: Mapping[str, tuple[int, ...]],
        with_masks: bool = False,
        prefetch: int = 4,
        bad_limit: int | None = None,
        ledger: Path | str | Ledger | None = None,
        memory_limit: int = 4 * 2**30,
    ) -> None:
        plan.bounds(0, rank, world)  # refuses a rank out of range
        if unknown := set(noise) - {"slots", "gate"}:
            raise ValueError(f"noise: {sorted(unknown)} is not drawn here; use `slots` and `gate`")
        if prefetch < 1:
            raise ValueError(f"prefetch: {prefetch} is less than 1; use a positive number")
        if plan.index.size is None:
            raise ValueError("plan: its index has no image size; read it from the folder with read_index")
        if not Path(folder).is_dir():
            raise DataError(f"{folder}: not a folder; render or ingest the shards first")
        _check_memory(plan, world, memory_limit)
        self.num_micro_batches, self.micro_batch = micro_batches(plan.batch_size, world, micro_batch)
        self.bad: dict[int, str] = {}
        self.waited = 0.0
        self._plan, self._rank, self._world, self._seed = plan, rank, world, seed
        self._size = plan.index.size
        self._noise = dict(noise)
        self._with_masks = with_masks
        self._bad_limit = max(10, plan.index.num_samples // 100) if bad_limit is None else bad_limit
        self._ledger = Path(ledger) if isinstance(ledger, str) else ledger
        self._reader = Reader(plan, Path(folder), with_masks)
        self._prefetch = prefetch
        self._thread: _Prefetcher | None = None

    def batch_size(self, step: int) -> int:
        """Samples of a step over all ranks: short in the last step of an epoch."""
        return self._plan.size(step)

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's slice of a step.

        Returns:
            Always A micro batches of m samples; weights over all ranks sum to `batch_size(step)`.

        Raises:
            DataError: too many bad samples, a window without a good one, or a shard that cannot be read.
        """
        if self._thread is None or self._thread.next != step:
            self.close()
            self._plan.size(step)  # refuses a negative step
            self._thread = _Prefetcher(self._make, step, self._prefetch)
        start = time.perf_counter()
        made = self._thread.take()
        self.waited += time.perf_counter() - start
        if made.error is not None:
            self.close()
            raise made.error
        self._record(made)
        return made.micro_batches

    def close(self) -> None:
        """Stop reading ahead. The stream can be used again."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- in the thread -------------------------------------------------------------------------------------------

    def _make(self, step: int) -> _Step:
        self._check_limit()  # once above the limit no later step gets by
        begin, end = self._plan.bounds(step, self._rank, self._world)
        # A rank without samples pads with a neighbour's: its micro batches must have the same shape.
        low = min(begin, self._plan.size(step) - 1)
        spans = self._plan.spans(step, low, max(end, low + 1))
        entries: list[_Entry] = []
        for span in spans:
            entries += self._entries(span, low + len(entries))
        self._reader.keep({span.window.lane for span in spans})
        real = end - begin
        padded = entries + [entries[-1]] * (self.num_micro_batches * self.micro_batch - len(entries))
        parts = [
            self._collate(step, padded[i : i + self.micro_batch], real - i)
            for i in range(0, len(padded), self.micro_batch)
        ]
        return _Step(step, parts, entries[:real])

    def _entries(self, span: Span, place: int) -> list[_Entry]:
        order = self._plan.order(span.window)
        entries: list[_Entry] = []
        for i in range(span.first, span.first + span.count):
            planned = int(order[i])
            sample = self._sample(span, planned)
            number = planned
            if sample is None:
                number, sample = self._replacement(span, i)
            entries.append(_Entry(place + len(entries), number, planned if number != planned else -1, sample))
        return entries

    def _replacement(self, span: Span, entry: int) -> tuple[int, Sample]:
        for number in self._plan.replacements(span.window, entry):
            sample = self._sample(span, number)
            if sample is not None:
                return number, sample
        shards = ", ".join(self._plan.index.shards[piece.shard].name for piece in self._plan.pieces(span.window))
        raise DataError(f"no good sample in {shards}; repair these shards, or use a larger window")

    def _sample(self, span: Span, number: int) -> Sample | None:
        """A decoded sample, or None where it is bad."""
        if number in self.bad:
            return None
        raw = self._reader.window(span.window)[number]
        if isinstance(raw, Fault):
            self._count_bad(number, raw.reason)
            return None
        try:
            return decode(raw.members, self._with_masks, self._size)
        except BadSample as error:
            shard, row = self._plan.index.locate(number)
            name = self._plan.index.shards[shard].name
            logger.warning("shard %s, key %s (row %d): %s; it is replaced", name, raw.key, row, error)
            self._count_bad(number, str(error))
            return None

    def _count_bad(self, number: int, reason: str) -> None:
        self.bad[number] = reason
        self._check_limit()

    def _check_limit(self) -> None:
        if len(self.bad) > self._bad_limit:
            index = self._plan.index
            shards = Counter(index.shards[index.locate(bad)[0]].name for bad in self.bad)
            worst = ", ".join(f"{name} ({count})" for name, count in shards.most_common(3))
            raise DataError(
                f"bad samples: {len(self.bad)} of {index.num_samples}, more than the limit of {self._bad_limit}; "
                f"most in {worst}; the last: {list(self.bad.values())[-1]}. "
                "Repair these shards, index them again, or raise the limit"
            )

    def _collate(self, step: int, entries: list[_Entry], real: int) -> MicroBatch:
        places = np.array([entry.place for entry in entries], dtype=np.int64)  # [m]
        masks = [entry.sample.masks for entry in entries if entry.sample.masks is not None]
        slots = gate = None
        if "slots" in self._noise:
            slots = torch.from_numpy(normal(self._seed, Purpose.SLOTS, step, places, self._noise["slots"]))
        if "gate" in self._noise:
            gate = torch.from_numpy(gumbel(self._seed, Purpose.GATE, step, places, self._noise["gate"]))
        return MicroBatch(
            images=to_model(np.stack([entry.sample.image for entry in entries])),
            weight=torch.from_numpy((np.arange(len(entries)) < real).astype(np.float32)),
            slot_noise=slots,
            gate_noise=gate,
            num_objects=torch.tensor([entry.sample.num_objects for entry in entries], dtype=torch.int64),
            masks=torch.from_numpy(np.stack(masks).astype(np.int64)) if self._with_masks else None,
            ids=torch.tensor([entry.number for entry in entries], dtype=torch.int64),
            places=torch.from_numpy(places),
        )

    # --- in the caller -------------------------------------------------------------------------------------------

    def _record(self, made: _Step) -> None:
        """Note what was handed out; steps that were only prefetched do not count."""
        if self._ledger is None:
            return
        lines = [(made.number, self._rank, entry.place, entry.number, entry.replaced) for entry in made.entries]
        if isinstance(self._ledger, Path):
            with self._ledger.open("a") as file:
                file.write("".join(" ".join(map(str, line)) + "\n" for line in lines))
        else:
            for line in lines:
                self._ledger(*line)


class _Prefetcher:
    """A thread that makes steps from `first` on and keeps a few ready."""

    def __init__(self, make: Callable[[int], _Step], first: int, ahead: int) -> None:
        self.next = first
        self._make = make
        self._ready: queue.Queue[_Step] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first,), name="stream", daemon=True)
        self._thread.start()

    def take(self) -> _Step:
        made = self._ready.get()
        self.next += 1
        return made

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():  # it may be waiting for room
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)
        self._thread.join()

    def _run(self, step: int) -> None:
        while not self._stop.is_set():
            try:
                made = self._make(step)
            except BaseException as error:  # raised again by Stream.step, in its turn
                made = _Step(step, [], [], error)
            self._ready.put(made)
            if made.error is not None:
                return
            step += 1


def _check_memory(plan: Plan, world: int, limit: int) -> None:
    needed = plan.open_lanes(world) * plan.window_bytes
    if needed > limit:
        raise ValueError(
            f"lanes x window: {plan.open_lanes(world)} open lanes of {plan.window} shards take up to "
            f"{needed / 2**30:.1f} GiB, the limit is {limit / 2**30:.1f} GiB; "
            "lower lanes or window, or write smaller shards"
        )
