"""How long it takes to start: python -m benchmarks.startup [--repeats 5] [--write]

`slotforge --help`; and `slotforge train`, on one worker whose shards are rendered, from the command to the end of its
first step, with the parts that the processes tell of themselves. Each in a fresh process, with Python's caches warm.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.page import machine, versions, write

PACKAGES = ("torch", "ray", "deepspeed", "mlflow")
MARKS = ("starting Ray", "from step", "training on", "training from", "training  loss")
"""What the driver prints, in this order; the last one is its first word of a step, half a second late at most."""
NAMES = (
    "imports, the recipe's check",
    "Ray, the data's check, MLflow",
    "workers and their imports",
    "DeepSpeed, the model",
    "the first step",
)
OPTIONS = [
    *("train.steps=12", "train.warmup_steps=1", "train.decay_steps=0", "data.scenes.train=1000", "data.scenes.eval=64"),
    *("registry.floors={}", "parallel.workers={min: 1, max: 1}"),
]


def help_seconds() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "orchestration.cli", "--help"], check=True, capture_output=True)
    return time.perf_counter() - began


def train_seconds(home: Path, name: str, rendered: bool = True) -> list[float]:
    """Of each part, in the order of NAMES; a run that renders its shards first need not tell all."""
    environment = {**os.environ, "SLOTFORGE_HOME": str(home), "RAY_TMPDIR": str(home / "r"), "PYTHONUNBUFFERED": "1"}
    sets = [part for change in [*OPTIONS, f"name={name}"] for part in ("--set", change)]
    command = [sys.executable, "-m", "orchestration.train", "--recipe", "tetrominoes", *sets]
    began, ends = time.perf_counter(), list[float]()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        while len(ends) < len(MARKS) and MARKS[len(ends)] in line:
            ends.append(time.perf_counter())
    if process.wait() or (rendered and len(ends) < len(MARKS)):
        raise SystemExit(f"the run told {len(ends)} of {len(MARKS)} marks:\n{''.join(said)[-4000:]}")
    return [end - before for before, end in zip([began, *ends], ends, strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into BENCHMARKS.md")
    options = parser.parse_args()
    around = machine()
    helps = [help_seconds() for _ in range(options.repeats + 1)][1:]
    with tempfile.TemporaryDirectory(prefix="sf") as folder:
        home = Path(folder)
        (home / "r").mkdir()
        train_seconds(home, "start", rendered=False)
        runs = [train_seconds(home, f"start-{number}") for number in range(options.repeats)]
    rows = [("slotforge --help", helps), *zip(NAMES, zip(*runs, strict=True), strict=True)]
    rows.append(("**slotforge train, to its first step**", [sum(run) for run in runs]))
    text = "\n".join(
        [
            "## Starting",
            "",
            f"    python -m benchmarks.startup --repeats {options.repeats}",
            "",
            f"Tetrominoes as published, one worker, {options.repeats} starts. {around}; {versions(*PACKAGES)}.",
            "",
            "| part | seconds: median (spread) |",
            "|---|---|",
            *(
                f"| {name} | {statistics.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f}) |"
                for name, taken in rows
            ),
        ]
    )
    print(text)
    if options.write:
        write("startup", text)


if __name__ == "__main__":
    main()
