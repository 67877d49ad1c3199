"""What the service costs: images a second of `slotforge train`, beside the bare loop, and on twice the cores.

    python -m benchmarks.service [--write]

    bare      orchestration.bare: the same recipe and training loop in a process of its own, without Ray, DeepSpeed,
              MLflow, evaluation and checkpoints
    service   slotforge train with one worker, with all of them
    one, two  slotforge train with one worker on one core, and two workers with a core each

The two of a pair run at the same time, by turns of two seconds in which the other one is stopped with all of its
processes: this machine's speed changes more in a minute than the difference is. A rate is that of the steps' own times,
as the curves keep them, less the time in which the run was stopped; from when both have done the steps that are not
counted until one ends. So it holds all that is between steps: logging, checkpoints, the driver.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.page import machine, versions, write
from benchmarks.turns import Turn, alternate

SKIPPED = 10  # steps
SECTION = "service"
SCENES = ("data.scenes.train=1000", "data.scenes.eval=64")
PACKAGES = ("torch", "ray", "deepspeed", "mlflow")

BARE = """
import sys, time
import torch
torch.set_num_threads(int(sys.argv[1]))
from orchestration.kept_memory import keep_memory
keep_memory()
from orchestration.bare import train_bare
from orchestration.prepare import data_folders
from orchestration.recipe import load_recipe
recipe = load_recipe(sys.argv[2], sys.argv[3:])
train_bare(recipe, data_folders(recipe), hooks=(lambda report: print(time.time(), flush=True),))
"""
CURVE = """
import json, sys
from mlflow import MlflowClient
from orchestration.recipe import load_recipe
from orchestration.runs.folder import RunFolder
client = MlflowClient(sys.argv[1])
folder = RunFolder.of(load_recipe(sys.argv[2], sys.argv[3:]))
points = client.get_metric_history(folder.facts["mlflow"]["run"], "loss/total")
print(json.dumps([point.timestamp / 1000 for point in sorted(points, key=lambda point: point.step)]))
"""


@dataclass(frozen=True)
class Kind:
    """A way to train: its cores, and workers of `slotforge train`; none is the bare loop."""

    cores: int
    workers: int | None


KINDS = {"bare": Kind(2, None), "service": Kind(2, 1), "one": Kind(1, 1), "two": Kind(2, 2)}
PAIRS = (("bare", "service", 1), ("one", "two", 2))
"""What is compared, and how many times as fast the second should be."""


class Run:
    """A run of a recipe in a state folder of its own."""

    def __init__(self, home: Path, kind: Kind, recipe: str, steps: int, name: str) -> None:
        workers = kind.workers or 1
        self._arguments = [
            recipe,
            *(f"name={name}", f"parallel.workers={{min: {workers}, max: {workers}}}", "parallel.device=cpu"),
            *("train.warmup_steps=10", "train.decay_steps=0", "train.gate_from=0", "train.random_from=null"),
            # Both of a pair shall train for about as long; the bare loop starts sooner, and is ended with the other.
            *(f"train.steps={steps * (kind.workers or 100)}", f"train.checkpoint_every={steps // 2}"),
            *("tracking.every=1", f"evaluate.every={10 * steps}", "registry.floors={}", *SCENES),
        ]
        self._home, self._kind = home, kind
        (home / "r").mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "SLOTFORGE_HOME": str(home), "RAY_TMPDIR": str(home / "r")}
        environment.pop("MLFLOW_TRACKING_URI", None)
        sets = [part for change in SCENES for part in ("--set", change)]
        render = [sys.executable, "-m", "orchestration.cli", "shards", "make", "--local", "--recipe", recipe, *sets]
        subprocess.run(render, env=environment, check=True, capture_output=True)  # noqa: S603 nothing to do but once
        self.turn = Turn(self._command(), home / f"{name}.log", environment, ends=kind.workers is not None)

    def _command(self) -> list[str]:
        cores = ["taskset", "-c", ",".join(str(core) for core in range(self._kind.cores)), sys.executable]
        if self._kind.workers is None:
            return [*cores, "-c", BARE, str(self._kind.cores), *self._arguments]
        sets = [part for change in self._arguments[1:] for part in ("--set", change)]
        return [*cores, "-m", "orchestration.train", "--recipe", self._arguments[0], *sets]

    def times(self) -> list[float]:
        """When each step ended."""
        if self._kind.workers is None:
            return [float(line) for line in self.turn.output.read_text().splitlines()]
        command = [sys.executable, "-c", CURVE, f"sqlite:///{self._home / 'mlflow.db'}", *self._arguments]
        done = subprocess.run(  # noqa: S603
            command, env=self.turn.environment, capture_output=True, text=True, check=True
        )
        found: list[float] = json.loads(done.stdout.splitlines()[-1])
        return found


def rates(folder: Path, pair: tuple[str, str], recipe: str, steps: int, repeat: int) -> tuple[float, float]:
    """Steps a second of two kinds that run by turns."""
    kinds = pair if repeat % 2 == 0 else pair[::-1]
    runs = {name: Run(folder / name, KINDS[name], recipe, steps, f"{name}-{repeat}") for name in kinds}
    alternate([run.turn for run in runs.values()])
    times = {name: run.times() for name, run in runs.items()}
    begin, end = max(moments[SKIPPED] for moments in times.values()), min(moments[-1] for moments in times.values())

    def rate(name: str) -> float:
        counted = [moment for moment in times[name] if begin <= moment <= end]
        return (len(counted) - 1) / runs[name].turn.seconds(counted[0], counted[-1])

    return rate(pair[0]), rate(pair[1])


def measured(recipe: str, steps: int, repeats: int, batch: int) -> Iterator[str]:
    """Rows of the table in Markdown."""
    for base, name, times in PAIRS:
        with tempfile.TemporaryDirectory(prefix="sf") as folder:
            found = [rates(Path(folder), (base, name), recipe, steps, repeat) for repeat in range(repeats)]
        shares = [b / (times * a) for a, b in found]
        print(f"{recipe}, {name} against {base}: {', '.join(f'{share:.1%}' for share in shares)}", flush=True)
        spreads = (
            f"{batch * statistics.median(ours):.0f} ({batch * min(ours):.0f} to {batch * max(ours):.0f})"
            for ours in zip(*found, strict=True)
        )
        yield (
            f"| {recipe} | {name} against {'twice ' * (times - 1)}{base} | {' | '.join(spreads)} | "
            f"{statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%}) |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help="tetrominoes if not given")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="into BENCHMARKS.md")
    options = parser.parse_args()
    from orchestration.recipe import load_recipe

    around = machine()
    rows = [
        row
        for recipe in options.recipe or ["tetrominoes"]
        for row in measured(recipe, options.steps, options.repeats, load_recipe(recipe).train.batch_size)
    ]
    text = "\n".join(
        [
            "## What the service costs, and two workers",
            "",
            f"    python -m benchmarks.service --steps {options.steps} --repeats {options.repeats}",
            "",
            f"Steps {SKIPPED + 1} to {options.steps} (with two workers, twice as many), ZeRO stage 2, a checkpoint "
            f"every {options.steps // 2} steps, points at every step; {options.repeats} runs of each, a pair by turns "
            f"of two seconds. {around}; {versions(*PACKAGES)}.",
            "",
            "| recipe | what | images/s: median (spread) | images/s | share |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )
    print(text)
    if options.write:
        write(SECTION, text)


if __name__ == "__main__":
    main()
