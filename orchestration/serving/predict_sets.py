"""A registered model over a whole set, in parallel with Ray Data; a killed run goes on from the parts that are whole.

A task reads and decodes each shard; a pool of actors that hold the model finds the objects and writes the parts. What
is written is a function of the set and the model: parts are cut before anything runs, and a part is seen in batches of
its own.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orchestration.kept_memory import keeping_memory
from orchestration.serving.finder import Finder, ModelName
from orchestration.serving.images import ImageError, framed
from orchestration.serving.parts import Part, Work, write
from orchestration.serving.sources import Source
from pipelines import DataError, TransientError

_READER_CPUS, _MODEL_CPUS = 0.25, 0.75
_TOLD_BY_US = ("ray.data._internal.progress", "ray.data._internal.execution.streaming_executor_state")
"""Loggers: the progress bar is ours, and what fails is raised too."""


@dataclass(frozen=True)
class Step:
    """A part that is done.

    Fields:
        images: in it.
        failed: of these, how many could not be predicted.
        reasons: of each, or one for the whole shard.
    """

    images: int
    failed: int
    reasons: list[str]


def predict_parts(
    source: Source, work: Work, *, model: ModelName, side: int, out: Path, workers: int
) -> Iterator[Step]:
    """Predicts the missing parts of a set, on the connected Ray; tells each as it is written.

    Args:
        model: pinned.
        side: pixels that it sees.
        out: a folder that all nodes share.
        workers: models side by side.

    Raises:
        TransientError: the storage does not answer.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours is in the terminal
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for told in _TOLD_BY_US:
        logging.getLogger(told).setLevel(logging.CRITICAL)
    workers = min(workers, len(work.missing))
    data = ray.data.read_datasource(
        _datasource(source, work.missing, side),
        concurrency=workers,  # decoding keeps ahead of the model with less
        override_num_blocks=len(work.missing),
        num_cpus=_READER_CPUS,
    ).map_batches(
        Predictor,
        fn_constructor_args=(model, out.absolute()),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=_MODEL_CPUS,
        runtime_env={"env_vars": keeping_memory()},
    )
    try:
        for row in data.iter_rows():
            yield Step(**row)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TransientError):
            raise TransientError(str(error.cause).partition("\n")[0]) from None  # Ray puts advice of its own after it
        raise


def read_parts(source: Source, parts: Sequence[Part], side: int) -> Iterator[pa.Table]:
    """A table of one row for each part of one unit: what is sent from who reads to who predicts."""
    left = list(parts)
    keys: list[str] = []
    reasons: list[str] = []  # empty where the image is good
    pixels: list[bytes] = []
    try:
        for number, image in enumerate(source.read(parts[0].unit)):
            if not left:
                break
            if number < left[0].first:
                continue
            keys.append(image.key)
            try:
                pixels.append(framed(image.decode(), side).pixels.tobytes())
                reasons.append("")
            except ImageError as error:
                reasons.append(str(error))
            if number + 1 == left[0].last:
                yield _row(left.pop(0), keys, reasons, b"".join(pixels))
                keys, reasons, pixels = [], [], []
    except TransientError:
        raise
    except DataError as error:  # nothing of it can be read: nothing is written, so that a repaired one is read again
        for part in left:
            yield _row(part, [], [str(error)], b"")


def _row(part: Part, keys: list[str], reasons: list[str], pixels: bytes) -> pa.Table:
    return pa.table(
        {
            "part": [part.name],
            "unit": [part.unit],
            "first": [part.first],
            "last": [part.last],
            "keys": pa.array([keys], pa.list_(pa.string())),
            "reasons": pa.array([reasons], pa.list_(pa.string())),
            "pixels": pa.array([pixels], pa.large_binary()),
        }
    )


class Predictor:
    """An actor that holds the model, and writes what it finds."""

    def __init__(self, model: ModelName, out: Path) -> None:
        import torch

        torch.set_num_threads(1)  # what is found must not depend on the machine's cores
        self._finder, self._out = Finder.of(model), out

    def __call__(self, rows: pa.Table) -> pa.Table:
        (row,) = rows.drop_columns(["pixels"]).to_pylist()
        part = Part(row["part"], row["unit"], row["first"], row["last"])
        count = part.last - part.first
        if not row["keys"]:
            told, failed = [f"{part.name}: {row['reasons'][0]}"], count
        else:
            side = self._finder.side
            images = np.frombuffer(rows["pixels"][0].as_buffer(), dtype=np.uint8).reshape(-1, side, side, 3)
            found = iter(self._finder.find(images))
            told = write(self._out, part, row["keys"], (reason or next(found) for reason in row["reasons"]))
            failed = len(told)
        reasons = pa.array([told], pa.list_(pa.string()))
        return pa.table({"images": [count], "failed": [failed], "reasons": reasons})


def _datasource(source: Source, units: list[list[Part]], side: int) -> Any:
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Parts(Datasource):
        """A read task for each unit, whatever parallelism is asked for."""

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            return [ReadTask(_reading(source, parts, side), _about(parts, BlockMetadata)) for parts in units]

        def estimate_inmemory_data_size(self) -> int:
            return sum(part.last - part.first for parts in units for part in parts) * side * side * 3

    def _about(parts: list[Part], metadata: Any) -> Any:
        images = sum(part.last - part.first for part in parts)
        return metadata(num_rows=len(parts), size_bytes=images * side * side * 3, input_files=None, exec_stats=None)

    return Parts()  # type: ignore[no-untyped-call]


def _reading(source: Source, parts: list[Part], side: int) -> Callable[[], Iterator[pa.Table]]:
    return lambda: read_parts(source, parts, side)
