"""What a training process takes of its machine, as the kernel counts it."""

import platform
import subprocess
import sys

import pytest

BLOCK, TIMES = 64 * 2**20, 20  # bytes: more than glibc keeps of itself
PROGRAM = f"""
import resource, sys
import torch
from orchestration.cores import use_cores
if sys.argv[1] == "kept":
    use_cores(1)
    assert torch.get_num_threads() == 1
for _ in range({TIMES}):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros({BLOCK}, dtype=torch.uint8).fill_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_what_is_freed_is_there_for_the_next_step() -> None:
    counted = {}
    for kind in ("plain", "kept"):
        command = [sys.executable, "-c", PROGRAM, kind]
        counted[kind] = [*map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())]
    plain, kept = (sum(counted[kind][TIMES // 2 :]) for kind in ("plain", "kept"))  # the first few find their place
    assert counted["kept"][0] > 0  # faults are counted
    assert kept < plain / 100
