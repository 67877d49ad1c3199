"""What the service costs: images a second of `slotforge train`, beside the bare loop, and on twice the cores.

    python -m benchmarks.service [--write]

    bare      orchestration.bare: the same recipe and training loop in a process of its own, without Ray, DeepSpeed,
              MLflow, evaluation and checkpoints
    service   slotforge train with one worker, with all of them
    one, two  slotforge train with one worker on one core, and two workers with a core each

All run in turns, in fresh processes. A rate is that of the steps' own times, as the curves keep them, from the first
steps that are not counted to the last, so it holds all that is between steps: logging, checkpoints, the driver.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.page import machine, versions, write

SKIPPED = 10  # steps
SECTION = "service"
PACKAGES = ("torch", "ray", "deepspeed", "mlflow")

BARE = """
import json, sys, time
import torch
torch.set_num_threads(int(sys.argv[1]))
from orchestration.bare import train_bare
from orchestration.prepare import data_folders
from orchestration.recipe import load_recipe
recipe = load_recipe(sys.argv[2], sys.argv[3:])
times = []
train_bare(recipe, data_folders(recipe), hooks=(lambda report: times.append(time.time()),))
print(json.dumps(times))
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


class Runs:
    """Runs of one recipe in a state folder of their own."""

    def __init__(self, home: Path, recipe: str, steps: int) -> None:
        self._recipe, self._number = recipe, 0
        self._changes = [
            *(f"train.steps={steps}", "train.warmup_steps=10", "train.decay_steps=0", "train.gate_from=0"),
            *("train.random_from=null", "tracking.every=1", f"train.checkpoint_every={max(1, steps // 2)}"),
            *(f"evaluate.every={10 * steps}", "registry.floors={}", "data.scenes.train=4000", "data.scenes.eval=64"),
        ]
        self._environment = {**os.environ, "SLOTFORGE_HOME": str(home), "RAY_TMPDIR": str(home / "r")}
        self._environment.pop("MLFLOW_TRACKING_URI", None)
        self._uri = f"sqlite:///{home / 'mlflow.db'}"
        (home / "r").mkdir()

    def rate(self, kind: Kind) -> float:
        """Steps a second of a fresh run."""
        self._number += 1
        workers = kind.workers or 1
        changes = [
            f"name=bench-{self._number}",
            *(*self._changes, f"parallel.workers={{min: {workers}, max: {workers}}}", "parallel.device=cpu"),
        ]
        cores = ["taskset", "-c", ",".join(str(core) for core in range(kind.cores))]
        if kind.workers is None:
            times = self._json([*cores, sys.executable, "-c", BARE, str(kind.cores), self._recipe, *changes])
        else:
            sets = [part for change in changes for part in ("--set", change)]
            driver = [*cores, sys.executable, "-m", "orchestration.train", "--recipe", self._recipe, *sets]
            self._output(driver)
            times = self._json([sys.executable, "-c", CURVE, self._uri, self._recipe, *changes])
        counted = times[SKIPPED:]
        return (len(counted) - 1) / (counted[-1] - counted[0])

    def _json(self, command: list[str]) -> list[float]:
        import json

        found: list[float] = json.loads(self._output(command).splitlines()[-1])
        return found

    def _output(self, command: list[str]) -> str:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise SystemExit(f"{' '.join(command[:8])} ...\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return done.stdout


def measured(recipe: str, steps: int, repeats: int, batch: int) -> Iterator[str]:
    """Rows of the table in Markdown."""
    with tempfile.TemporaryDirectory(prefix="sf") as home:
        runs = Runs(Path(home), recipe, steps)
        runs.rate(KINDS["one"])  # renders the scenes, and fills the machine's caches
        rates: dict[str, list[float]] = {name: [] for name in KINDS}
        for repeat in range(repeats):
            for name in list(KINDS) if repeat % 2 == 0 else reversed(KINDS):
                rates[name].append(batch * runs.rate(KINDS[name]))
                print(f"{recipe} {name}: {rates[name][-1]:.1f} images/s", flush=True)
    for name, base, times in (("service", "bare", 1), ("two", "one", 2)):
        shares = [a / (times * b) for a, b in zip(rates[name], rates[base], strict=True)]
        spreads = (
            f"{statistics.median(rates[k]):.0f} ({min(rates[k]):.0f} to {max(rates[k]):.0f})" for k in (base, name)
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
            f"Steps {SKIPPED + 1} to {options.steps} of each run, ZeRO stage 2, checkpoints in the middle and at the "
            f"end, points at every step; {options.repeats} runs of each in turns. {around}; {versions(*PACKAGES)}.",
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
