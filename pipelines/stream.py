"""From a plan to batches: every step of a run as micro batches of one shape, read ahead by a thread."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batches import MicroBatch, Recycled, ToDevice
from pipelines.cache import Cache
from pipelines.decoding import Decoded, Decoder, Decoding, InThread, Processes
from pipelines.errors import DataError
from pipelines.noise import Purpose, gumbel, normal
from pipelines.order import Order, Span, micro_batches
from pipelines.prefetch import Prefetcher
from pipelines.reader import Fault, Reader
from pipelines.sources import Sources, local_path
from pipelines.tars import Raw
from pipelines.transforms import Augmentation, to_model
from pipelines.verdicts import BadSamples

__all__ = ["Ledger", "MicroBatch", "Stream"]

Ledger = Callable[[int, int, int, int, int], None]
"""Called with (step, rank, place, sample, replaced): `replaced` is the bad sample whose place it fills, or -1."""

_SAMPLES_AHEAD = 640  # that decode workers have, at least three steps and at most ten
_NOISE = {
    "slots": (normal, Purpose.SLOTS),
    "gate": (gumbel, Purpose.GATE),
    "inputs": (normal, Purpose.INPUTS),
}
"""What is drawn under each name."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """A step whose samples are being decoded.

    Fields:
        number: of the step.
        first: place of its first sample here.
        spans: where its samples come from, in order; `windows` holds what the window of each contains.
        numbers: its planned samples.
    """

    number: int
    first: int
    spans: list[Span]
    windows: list[Mapping[int, Raw | Fault]]
    numbers: list[int]

    def place(self, row: int) -> tuple[Span, int, Mapping[int, Raw | Fault]]:
        """Of a sample: its span, its entry in the span's window, and what that window holds."""
        for span, window in zip(self.spans, self.windows, strict=True):
            if row < span.count:
                return span, span.first + row, window
            row -= span.count
        raise IndexError(row)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that is ready, with (place, sample, replaced) of each entry; on a GPU once `copied` has come."""

    number: int
    micro_batches: list[MicroBatch]
    entries: list[tuple[int, int, int]]
    copied: "torch.cuda.Event | None" = None


class Stream:
    """A rank's share of a set of shards, step by step.

    Steps are usually asked for one after the other and are made ahead of time; any other step seeks, which reads at
    most one window per open lane. A sample with a permanent fault (its shard is gone or does not match its checksum, a
    member is missing, cannot be decoded or has the wrong size) is replaced by the next good one of its window: the same
    for every world size, logged once, and listed in `bad`. A shard that was found good and changes or goes away later
    stops whoever has found it good (pipelines/reader.py says what that leaves open).

    Args:
        plan: order of the set; its index must come from shards (it knows the image size).
        folder: path or address of the folder that holds the shards; not used where the plan's index knows (of several
            sets, from `read_index`).
        rank, world: this reader and how many there are.
        micro_batch: the most samples a micro batch may have.
        seed: of the noise.
        noise: shape of one sample's noise by name: `slots` (normal), `gate` (Gumbel), `inputs` (normal). What is left
            out is None.
        with_masks: decode masks; a sample without them is bad.
        augment: flips and crops of every sample, with noise of its own that is drawn for its step and place; after a
            crop `num_objects` counts the objects in view, or is -1 where there are no masks to count in.
        prefetch: steps made ahead of time.
        bad_limit: the most bad samples this reader accepts; by default 1 % of the set, at least 10.
        ledger: a file to which a line `step rank place sample replaced` is appended for each sample handed out, or a
            `Ledger`; one per rank. Padding is not recorded.
        memory_limit: bytes that the open windows may take.
        decode_workers: processes that decode; 0 decodes in the thread that reads ahead. The batches are the same.
        sources: reads files by address; by default with the retries and time-outs of `Sources`.
        cache: for shards that are not on this machine; without it they are read from afar each time.
        device: where the micro batches are to be; to a GPU they are copied ahead of time, on a CUDA stream of its own.

    Attributes:
        num_micro_batches, micro_batch: A and m; every step is A micro batches of m samples.
        waited: seconds that `step` has spent waiting for data.

    Raises:
        ValueError: an argument is out of range, or the open windows would take more than the memory limit.
        DataError: the folder is not there.
    """

    def __init__(
        self,
        plan: Order,
        folder: Path | str | None,
        *,
        rank: int,
        world: int,
        micro_batch: int,
        seed: int,
        noise: Mapping[str, tuple[int, ...]],
        with_masks: bool = False,
        augment: Augmentation | None = None,
        prefetch: int = 4,
        bad_limit: int | None = None,
        ledger: Path | str | Ledger | None = None,
        memory_limit: int = 4 * 2**30,
        decode_workers: int = 0,
        sources: Sources | None = None,
        cache: Cache | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        plan.bounds(0, rank, world)  # refuses a rank out of range
        if unknown := noise.keys() - _NOISE:
            raise ValueError(f"noise: {sorted(unknown)} is not drawn here; use {', '.join(_NOISE)}")
        if prefetch < 1:
            raise ValueError(f"prefetch: {prefetch} is less than 1; use a positive number")
        if plan.index.size is None:
            raise ValueError("plan: its index has no image size; read it from the folder with read_index")
        if decode_workers < 0:
            raise ValueError(f"decode_workers: {decode_workers} is negative; use 0 to decode without processes")
        if folder is None and not plan.index.folders:
            raise ValueError("folder: its shards could be anywhere; name the folder that holds them")
        homes = set(plan.index.folders) or {str(folder)}
        for home in sorted(homes):
            if (path := local_path(home)) is not None and not path.is_dir():
                raise DataError(f"{home}: not a folder; render or ingest the shards first")
        _check_memory(plan, world, memory_limit)
        self.num_micro_batches, self.micro_batch = micro_batches(plan.batch_size, world, micro_batch)
        self.waited = 0.0
        self._plan, self._rank, self._world, self._seed = plan, rank, world, seed
        self._noise = dict(noise)
        self._bad = BadSamples(plan.index, bad_limit)
        self._ledger = Path(ledger) if isinstance(ledger, str) else ledger
        self._sources = sources or Sources()
        self._reader = Reader(plan, str(folder), with_masks, self._sources, cache)
        self._decoding = Decoding(plan.index.size, with_masks, augment, seed)
        rows = self.num_micro_batches * self.micro_batch
        self._decoder: Decoder = (
            Processes(decode_workers, self._decoding, rows) if decode_workers else InThread(self._decoding, rows)
        )
        self._floats = Recycled((self.micro_batch, 3, *plan.index.size))
        # Processes decode on while this one reads several windows in a row, which lanes need at about the same time.
        self._begun_ahead = min(10, max(3, _SAMPLES_AHEAD // rows)) if decode_workers else 1
        self._to_device = ToDevice(torch.device(device)) if torch.device(device).type == "cuda" else None
        self._prefetch = prefetch
        self._thread: Prefetcher[_Begun, _Step] | None = None

    @property
    def bad(self) -> Mapping[int, str]:
        """Why each bad sample met so far is one, by its number."""
        return self._bad.reasons

    def batch_size(self, step: int) -> int:
        """Samples of a step over all ranks: short in the last step of an epoch."""
        return self._plan.size(step)

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's slice of a step.

        Returns:
            Always A micro batches of m samples; weights over all ranks sum to `batch_size(step)`.

        Raises:
            DataError: too many bad samples, a window without a good one, a shard that cannot be read or changed.
        """
        if self._thread is None or self._thread.next != step:
            self.close()
            self._plan.size(step)  # refuses a negative step
            self._sources.begin()
            self._thread = Prefetcher(self._begin, self._finish, step, self._prefetch, self._begun_ahead)
        start = time.perf_counter()
        try:
            made = self._thread.take()
        except BaseException:
            self.close()
            raise
        self.waited += time.perf_counter() - start
        self._record(made)
        if self._to_device is not None and made.copied is not None:
            self._to_device.arrive(made.micro_batches, made.copied)
        return made.micro_batches

    def close(self) -> None:
        """Stop reading ahead. The stream can be used again."""
        if self._thread is not None:
            self._sources.end()
            self._thread.close()
            self._thread = None
        self._decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- in the thread -------------------------------------------------------------------------------------------

    def _begin(self, step: int) -> _Begun:
        """Read a step's windows and have its samples decoded."""
        self._bad.check()  # once above the limit no later step gets by
        begin, end = self._plan.bounds(step, self._rank, self._world)
        # A rank without samples pads with a neighbour's: its micro batches must have the same shape.
        low = min(begin, self._plan.size(step) - 1)
        spans = self._plan.spans(step, low, max(end, low + 1))
        windows, numbers, members = [], [], []
        for span in spans:
            window = self._reader.window(span.window)
            planned = self._plan.order(span.window)[span.first : span.first + span.count].tolist()
            windows.append(window)
            numbers += planned
            members += [self._members(window, number) for number in planned]
        self._reader.keep({span.window.lane for span in spans})
        self._decoder.submit(members, step, low)
        return _Begun(step, low, spans, windows, numbers)

    def _members(self, window: Mapping[int, Raw | Fault], number: int) -> Mapping[str, bytes] | None:
        """What is to be decoded of a sample; None where it is known to be bad."""
        raw = window[number]
        return None if isinstance(raw, Fault) or number in self.bad else raw.members

    def _finish(self, begun: _Begun) -> _Step:
        """The micro batches of a step, bad samples replaced."""
        step, decoded = begun.number, self._decoder.take()
        numbers, replaced = begun.numbers.copy(), [-1] * len(begun.numbers)
        for row, found in enumerate(decoded.found):
            if not isinstance(found, int):
                replaced[row], numbers[row] = numbers[row], self._replace(begun, decoded, row)
        n, m = len(numbers), self.micro_batch
        begin, end = self._plan.bounds(step, self._rank, self._world)
        # Padding repeats the last sample, its noise too.
        rows = np.minimum(np.arange(self.num_micro_batches * m), n - 1)  # [A * m]
        for pixels in (decoded.images, decoded.masks):
            pixels[n:] = pixels[n - 1 : n]
        ids, objects = np.array(numbers, dtype=np.int64)[rows], np.array(decoded.found, dtype=np.int64)[rows]
        parts = [
            self._collate(step, decoded, slice(i, i + m), begun.first + rows[i : i + m], ids, objects, end - begin)
            for i in range(0, len(rows), m)
        ]
        handed = list(zip(range(begin, end), numbers, replaced, strict=False))
        copied = None
        if self._to_device is not None:
            parts, copied = self._to_device.send(parts)
        self._decoder.release()  # all pixels have been copied
        return _Step(step, parts, handed, copied)

    def _replace(self, begun: _Begun, decoded: Decoded, row: int) -> int:
        """Fill the row of a bad sample with the next good one of its window; the number of that."""
        span, entry, window = begun.place(row)
        self._judge(window, begun.numbers[row], decoded.found[row])
        image, masks = decoded.images[row], decoded.masks[row] if self._decoding.with_masks else decoded.masks
        for number in self._plan.replacements(span.window, entry):
            if (members := self._members(window, number)) is None:
                self._judge(window, number, None)
                continue
            found = self._decoding.fill(members, begun.number, begun.first + row, image, masks)
            if isinstance(found, int):
                decoded.found[row] = found
                return number
            self._judge(window, number, found)
        names = dict.fromkeys(self._plan.index.shards[piece.shard].name for piece in self._plan.pieces(span.window))
        raise DataError(f"no good sample in {', '.join(names)}; repair these shards, or use a larger window")

    def _judge(self, window: Mapping[int, Raw | Fault], number: int, found: int | str | None) -> None:
        raw = window[number]
        if isinstance(raw, Fault):
            self._bad.add(number, raw.reason)
        else:
            self._bad.add(number, str(found), raw.key)

    def _collate(
        self,
        step: int,
        decoded: Decoded,
        part: slice,
        places: NDArray[np.int64],
        ids: NDArray[np.int64],
        objects: NDArray[np.int64],
        real: int,
    ) -> MicroBatch:
        noise = {
            name: torch.from_numpy(draw(self._seed, purpose, step, places, self._noise[name]))
            for name, (draw, purpose) in _NOISE.items()
            if name in self._noise
        }
        pixels = decoded.images[part]  # [m, H, W, 3]
        return MicroBatch(
            # A GPU makes them floats itself, from a quarter of the bytes.
            images=to_model(pixels, self._floats.array()) if self._to_device is None else torch.from_numpy(pixels),
            weight=torch.from_numpy((np.arange(part.start, part.stop) < real).astype(np.float32)),
            slot_noise=noise.get("slots"),
            gate_noise=noise.get("gate"),
            input_noise=noise.get("inputs"),
            num_objects=torch.from_numpy(objects[part]),
            masks=torch.from_numpy(decoded.masks[part].astype(np.int64)) if self._decoding.with_masks else None,
            ids=torch.from_numpy(ids[part]),
            places=torch.from_numpy(places),
        )

    # --- in the caller -------------------------------------------------------------------------------------------

    def _record(self, made: _Step) -> None:
        """Note what was handed out; steps that were only prefetched do not count."""
        if self._ledger is None:
            return
        lines = [(made.number, self._rank, *entry) for entry in made.entries]
        if isinstance(self._ledger, Path):
            with self._ledger.open("a") as file:
                file.write("".join(" ".join(map(str, line)) + "\n" for line in lines))
        else:
            for line in lines:
                self._ledger(*line)


def _check_memory(plan: Order, world: int, limit: int) -> None:
    needed = plan.open_lanes(world) * plan.window_bytes
    if needed > limit:
        raise ValueError(
            f"lanes x window: {plan.open_lanes(world)} open lanes of {plan.window} shards take up to "
            f"{needed / 2**30:.1f} GiB, the limit is {limit / 2**30:.1f} GiB; "
            "lower lanes or window, or write smaller shards"
        )
