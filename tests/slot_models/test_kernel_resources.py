"""The Triton kernels compiled for GPUs by NVIDIA's own assembler: what it makes of them runs, and from registers.

The interpreter runs a kernel of any size, on any types; a GPU has 255 registers a thread and, since Ampere, 99 KiB of
shared memory a program at least. A kernel of more shared memory does not start; one of more registers keeps numbers in
memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slot_models.iterations import kernels

SHARED = 99 * 1024
STACK = 192  # bytes a thread: 48 of its registers; for some odd widths the assembler needs more

# dtype, channels, rows of a group: the published sizes, the largest that are taken, odd ones
PUBLISHED = ["bfloat16:64:4", "bfloat16:256:24", "bfloat16:512:5"]
LARGEST = ["bfloat16:128:32", "bfloat16:128:64", "bfloat16:16:64", "float32:64:24", "float32:128:11", "float32:32:64"]
EVEN = [*PUBLISHED, *LARGEST, "bfloat16:128:11", "bfloat16:32:33", "float32:64:7", "float32:16:64"]
ODD = ["bfloat16:7:3", "bfloat16:100:11", "bfloat16:200:24", "bfloat16:500:11", "float32:7:3", "float32:100:11"]


def resources(capability: int, cases: list[str], folder: Path) -> list[dict[str, Any]]:
    """In a process of its own: here Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(Path(__file__).with_name("compiled_kernels.py")), str(capability), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("capability", "cases"),
    [
        (90, PUBLISHED[:1]),
        *(pytest.param(of, EVEN + ODD, marks=pytest.mark.slow) for of in (80, 89, 90, 100, 120)),
    ],
)
def test_kernels_fit_a_gpu(capability: int, cases: list[str], tmp_path: Path) -> None:
    found = resources(capability, cases, tmp_path)
    assert len(found) == 4 * len(cases)
    for each in found:
        assert each["shared"] <= SHARED, each
        assert each["stack"] <= STACK or each["case"] in ODD, each


@pytest.mark.parametrize(
    ("dtype", "width", "rows", "half", "taken"),
    [
        *((torch.bfloat16, width, rows, False, True) for width, rows in ((64, 7), (256, 24), (512, 16), (128, 64))),
        *((torch.float32, width, rows, True, True) for width, rows in ((64, 7), (256, 24), (512, 16), (128, 64))),
        *((torch.float32, width, rows, False, True) for width, rows in ((64, 32), (128, 16), (32, 64))),
        *((torch.bfloat16, width, rows, False, False) for width, rows in ((513, 7), (257, 17), (129, 33), (16, 65))),
        *((torch.float32, width, rows, False, False) for width, rows in ((129, 7), (65, 17), (33, 33), (16, 65))),
        (torch.float64, 64, 7, False, False),
    ],
)
def test_what_would_not_fit_is_left_to_plain_torch(
    dtype: torch.dtype, width: int, rows: int, half: bool, taken: bool
) -> None:
    assert kernels.supports(torch.empty(1, 1, width, dtype=dtype), rows, half) == taken
