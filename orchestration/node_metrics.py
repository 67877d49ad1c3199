"""What a run asks of its machines: a thread on each node that looks now and then.

The names are MLflow's own, so that its page of system metrics shows them.
"""

import threading
import time
from collections.abc import Callable
from typing import Self

import psutil
import torch

SECONDS = 10.0  # between two looks
MEGABYTE = 1e6

Sample = tuple[str, float, int, int]
"""(name, value, timestamp in ms, number of the look)."""


def node_sample() -> dict[str, float]:
    """Of the whole machine. The share of the CPU is that since the last call."""
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
        "system/disk_usage_percentage": disk.percent,
        "system/disk_available_megabytes": disk.free / MEGABYTE,
        "system/network_receive_megabytes": network.bytes_recv / MEGABYTE,
        "system/network_transmit_megabytes": network.bytes_sent / MEGABYTE,
    }


def gpu_sample(device: torch.device, number: int) -> dict[str, float]:
    """Of this rank's GPU, the number-th of its node. What torch keeps for itself counts as used."""
    free, total = torch.cuda.mem_get_info(device)
    return {
        f"system/gpu_{number}_memory_usage_megabytes": (total - free) / MEGABYTE,
        f"system/gpu_{number}_memory_usage_percentage": 100 * (total - free) / total,
        f"system/gpu_{number}_memory_peak_allocated_megabytes": torch.cuda.max_memory_allocated(device) / MEGABYTE,
    }


class NodeMetrics:
    """Looks in a thread, for as long as it is entered.

    Args:
        look: values by name.
        tell: is given the samples of a look.
        seconds: between two looks.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        look: Callable[[], dict[str, float]],
        tell: Callable[[list[Sample]], None],
        seconds: float = SECONDS,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._look, self._tell, self._seconds, self._now = look, tell, seconds, now
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node-metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        self._look()  # the share of the CPU counts from here
        while not self._over.wait(self._seconds):
            number += 1
            when = int(self._now() * 1000)
            self._tell([(name, value, when, number) for name, value in self._look().items()])
