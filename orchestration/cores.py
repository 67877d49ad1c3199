"""What a process that computes on a CPU takes of its machine: threads, and memory that it does not give back."""

import ctypes
import platform

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT = 2**30  # bytes; larger blocks are rare, and a step waits less for them than for itself


def use_cores(threads: int) -> None:
    """Sets torch's threads, and has the C library keep what is freed for the next step.

    glibc gives blocks of more than 32 MB back to the kernel when they are freed. A step's activations are such blocks,
    and the next step would wait while the kernel maps their pages and zeroes them once more (benchmarks/autoencoder.py
    says for how long). A process that keeps them holds no more than its largest step did. Other C libraries are left
    as they are.
    """
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
