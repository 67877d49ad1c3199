"""What is left to look at when a run has diverged: the step, the losses before it, its samples, and norms."""

import math
import tarfile
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from orchestration.worker import DivergedError
from pipelines import DataError, Index, Sources, TransientError
from pipelines.mixture import Order
from pipelines.sets import Place, fetch_sidecar
from pipelines.shards import parse_sample, read_sample
from pipelines.sources import AbsentError, ChangedError, Version, join, local_path

MOST_SECONDS = 20.0  # that reading the samples' keys may take


def diagnose(error: DivergedError, module: nn.Module, order: Order, place: Place, sources: Sources) -> dict[str, Any]:
    """Facts of a divergence, as plain values.

    Args:
        error: names the step and what came before it.
        module: norms are of the weights that this rank holds, as they stand after the step or later.
        order: which samples the step saw.
        place: of the shards.
        sources: reads samples' keys from shards that are not files here.
    """
    keys = _Keys(order.index, place, sources)
    return {
        "error": str(error),
        "step": error.step,
        "losses": {str(step): _plain(loss) for step, loss in error.losses.items()},
        "gradient_norms": {str(step): _plain(norm) for step, norm in error.norms.items()},
        "weights": dict(_weights(module.named_parameters())),
        "samples": [_sample(int(number), order.index, keys) for number in order.batch(error.step - 1)],
    }


def _sample(number: int, index: Index, keys: "_Keys") -> dict[str, Any]:
    shard, row = index.locate(number)
    return {"sample": number, "shard": index.shards[shard].name, "row": row, "key": keys.of(shard, row)}


def _weights(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterable[tuple[str, dict[str, Any]]]:
    for name, parameter in parameters:
        values = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3 leaves a rank its part alone
        bad = int((~torch.isfinite(values)).sum())
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))  # squares of 1e20 are no float32
        yield name, {"norm": _plain(norm), "not_finite": bad, "of": values.numel()}


class _Keys:
    """Reads samples' keys, wherever the shards lie; storage that does not answer is asked no more."""

    def __init__(self, index: Index, place: Place, sources: Sources) -> None:
        self._index, self._place, self._sources = index, place, sources
        self._offsets: dict[int, tuple[int, ...]] = {}  # by shard
        self._given_up: str | None = None
        self._until = time.monotonic() + MOST_SECONDS

    def of(self, number: int, row: int) -> str:
        """The key in a row of a shard, or why there is none."""
        if self._given_up is None and time.monotonic() > self._until:
            self._given_up = f"not read: the others took {MOST_SECONDS:.0f} s"
        if self._given_up is not None:
            return self._given_up
        try:
            return self._read(number, row)
        except TransientError as error:
            self._given_up = f"cannot be read: {error}"
            return self._given_up
        except (OSError, DataError, AbsentError, ChangedError, tarfile.TarError, ValueError, IndexError) as error:
            return f"cannot be read: {error}"

    def _read(self, number: int, row: int) -> str:
        shard = self._index.shards[number]
        folder = self._index.folders[number] if self._index.folders else str(self._place)
        if (path := local_path(folder)) is not None:
            return read_sample(path, shard.name, row)[0]
        if number not in self._offsets:
            self._offsets[number] = fetch_sidecar(folder, shard.name, self._sources).offsets
        first, last = self._offsets[number][row : row + 2]
        url = join(folder, shard.name)
        return parse_sample(self._sources.read_range(url, first, last, Version(shard.bytes)))[0]


def _plain(value: float) -> float | str:
    """JSON has no word for NaN."""
    return value if math.isfinite(value) else str(value)
