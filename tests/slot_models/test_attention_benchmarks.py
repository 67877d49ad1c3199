"""The benchmarks of slot attention: that they compare the same maths, and run where there is no GPU."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from slot_oracles import distance, published_slot_attention

from benchmarks.attention import OURS, fastest, most_held, steps
from benchmarks.gpu_attention import report
from benchmarks.usual_attention import UsualSlotAttention


def test_the_usual_order_is_the_published_equations() -> None:
    torch.manual_seed(0)
    usual = UsualSlotAttention(4, 6, hidden_dim=7).double()
    weights = {
        **{f"to_{name}": getattr(usual, f"to_{name}").weight for name in ("query", "key", "value")},
        **{name: weight for name, weight in usual.named_parameters() if name.startswith(("gru", "norm_"))},
        **{
            f"mlp.{place + 1}.{part}": getattr(usual.mlp[place], part)
            for place in (0, 2)
            for part in ("weight", "bias")
        },
        "mlp.0.weight": usual.norm_mlp.weight,
        "mlp.0.bias": usual.norm_mlp.bias,
    }
    inputs = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.manual_seed(1)
    found = usual(inputs)
    torch.manual_seed(1)
    initial = usual.mu + usual.log_sigma.exp() * torch.randn(2, 4, 6)
    assert distance(found, published_slot_attention(weights, inputs, initial, 3)) <= 1e-10


def test_a_step_of_everyone_runs_and_ours_holds_the_least() -> None:
    held = {name: most_held(step) for name, step in steps(2, 2000, 16, 3).items()}
    assert held[OURS] == min(held.values())


def test_what_is_held_is_what_was_allocated_at_once() -> None:
    def step() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        torch.ones(500) + second[:500]

    assert 8000 <= most_held(step) < 8100  # scalars take some bytes


def test_speeds_are_against_the_fastest_other() -> None:
    assert fastest({OURS: [1.0, 2.0], "slow": [9.0, 8.0], "fast": [3.0, 4.0]}, min) == ("fast", 3.0)


def test_the_gpu_benchmark_runs_in_small() -> None:
    tables = report(small=True)
    rows = [line for line in tables.splitlines() if re.match(r"\| 2, 40, 16, 3 \|", line)]
    assert len(rows) == 3 and "nan" not in tables
    errors = [float(cell) for cell in rows[2].split("|")[2:-1]]
    assert len(errors) == 4 and max(errors) < 0.1


def test_the_gpu_benchmark_runs_from_a_folder_that_is_not_installed(tmp_path: Path) -> None:
    """Without site, which would add the folder of an editable install."""
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    command = [sys.executable, "-S", str(script), "--help"]
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--write" in done.stdout, done.stderr
