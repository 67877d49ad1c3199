"""How long something takes on the device that torch uses."""

import statistics
import time
from collections.abc import Callable

import torch


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median of the repeats, after three that are not counted; on a GPU of the time between two events."""
    taken = []
    for _ in range(3 + repeats):
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken[3:])
