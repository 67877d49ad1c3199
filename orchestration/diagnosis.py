"""What is left to look at when a run has diverged: the step, the losses before it, its samples, and norms."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from orchestration.worker import DivergedError
from pipelines import DataError, Index
from pipelines.mixture import Order
from pipelines.sets import Place
from pipelines.shards import read_sample
from pipelines.sources import local_path


def diagnose(error: DivergedError, module: nn.Module, order: Order, place: Place) -> dict[str, Any]:
    """Facts of a divergence, as plain values.

    Args:
        error: names the step and what came before it.
        module: norms are of the weights that this rank holds, as they stand after the step or later.
        order: which samples the step saw.
        place: of the shards; where they are files, their samples' keys are told too.
    """
    return {
        "error": str(error),
        "step": error.step,
        "losses": {str(step): _plain(loss) for step, loss in error.losses.items()},
        "gradient_norms": {str(step): _plain(norm) for step, norm in error.norms.items()},
        "weights": dict(_weights(module.named_parameters())),
        "samples": [_sample(int(number), order.index, place) for number in order.batch(error.step - 1)],
    }


def _weights(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterable[tuple[str, dict[str, Any]]]:
    for name, parameter in parameters:
        values = getattr(parameter, "ds_tensor", parameter).detach().float()  # ZeRO-3 leaves a rank its part alone
        bad = int((~torch.isfinite(values)).sum())
        yield name, {"norm": _plain(float(values.norm())), "not_finite": bad, "of": values.numel()}


def _sample(number: int, index: Index, place: Place) -> dict[str, Any]:
    shard, row = index.locate(number)
    facts: dict[str, Any] = {"sample": number, "shard": index.shards[shard].name, "row": row}
    folder = local_path(index.folders[shard] if index.folders else str(place))
    if folder is not None:
        try:
            facts["key"] = read_sample(folder, facts["shard"], row)[0]
        except (OSError, DataError) as error:
            facts["key"] = f"cannot be read: {error}"
    return facts


def _plain(value: float) -> float | str:
    """JSON has no word for NaN."""
    return value if math.isfinite(value) else str(value)
