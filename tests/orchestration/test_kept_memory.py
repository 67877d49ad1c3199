"""What is freed is there for the next step, as the kernel counts it."""

import os
import platform
import subprocess
import sys

import pytest

from orchestration.kept_memory import keeping_memory

TIMES = 40
PROGRAM = f"""
import resource, sys, threading
import torch
from orchestration.kept_memory import keep_memory
if sys.argv[1] == "itself":
    keep_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def steps():
    for _ in range({TIMES}):
        before = faults()
        blocks = [torch.empty(size * 2**20, dtype=torch.uint8).fill_(1) for size in (33, 50, 50)]
        del blocks
        print(faults() - before)

if sys.argv[2] == "main":
    steps()
else:
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
"""


def settled(kind: str, thread: str, **variables: str) -> int:
    """Page faults of a process's last steps; in the first ones (up to 9 were seen) the blocks find their place."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    command = [sys.executable, "-c", PROGRAM, kind, thread]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    faults = [int(line) for line in done.stdout.split()]
    assert len(faults) == TIMES and faults[0] > 0
    return sum(faults[TIMES // 2 :])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_a_process_that_keeps_its_memory_is_not_given_it_again() -> None:
    plain = settled("plain", "main")
    assert settled("itself", "main") < plain / 10
    for thread in ("main", "other"):
        assert settled("started so", thread, **keeping_memory({})) < plain / 10


def test_what_is_set_already_stands() -> None:
    assert keeping_memory({"PATH": "/bin"}).keys() == {"MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"}
    assert keeping_memory({"MALLOC_MMAP_THRESHOLD_": "65536"}) == {}
