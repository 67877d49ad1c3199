"""Memory that a process on a CPU keeps between two steps or batches, instead of giving it back to the kernel.

glibc gives blocks of more than 32 MB back when they are freed. A step's activations are such blocks, and each next step
waits while the kernel maps their pages and zeroes them once more: longer than for a third of its arithmetic, at the
published sizes (benchmarks/autoencoder.py). So does each batch of a model that serves. What is kept finds its place
among other blocks, so that a process takes up to half as much more at its most, and holds that. Other C libraries are
left as they are.
"""

import ctypes
import os
import platform
from collections.abc import Mapping

_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}  # no blocks outside the heap, which never shrinks
_OF_MALLOPT = {"MALLOC_MMAP_MAX_": -4, "MALLOC_TRIM_THRESHOLD_": -1}


def keeping_memory(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a process is started with that is to keep what any of its threads frees.

    Threads get heaps of their own from glibc, of 64 MB at most, so all share the first one here.

    Args:
        environment: what it would be started with; where that sets glibc's variables already, they stand.
    """
    if any(name.startswith("MALLOC_") for name in environment):
        return {}
    return {"MALLOC_ARENA_MAX": "1", **_KEPT}


def keep_memory() -> None:
    """The same for this process, from now on, and what its main thread frees."""
    if platform.libc_ver()[0] == "glibc":
        for name in keeping_memory():
            if name in _OF_MALLOPT:
                ctypes.CDLL(None).mallopt(_OF_MALLOPT[name], int(_KEPT[name]))
