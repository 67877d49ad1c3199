"""How long it takes to start: python -m benchmarks.startup [--workers 2] [--repeats 5] [--write]

`slotforge --help`; and `slotforge train` from the command to the end of its first step, with the parts that the
processes tell of themselves and the seconds of a core that all of them have used by then. The shards are rendered
before, by a run that is told apart. Each in a fresh process, with Python's caches warm. On a machine that does other
work the cores' seconds tell more than the clock's.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.page import machine, versions, write
from benchmarks.turns import family

PACKAGES = ("torch", "ray", "deepspeed", "mlflow")
MARKS = ("starting Ray", "from step", "training from", "training  loss")
"""What the driver prints, in this order; the last one is its first word of a step, half a second late at most."""
NAMES = (
    "imports, the recipe's check",
    "Ray, the data's check, MLflow",
    "workers, their imports, the model",
    "the first step",
)
TOTAL, CORES = "**slotforge train, to its first step**", "seconds of a core, of all processes"
SCENES = (1000, 64)
OPTIONS = [
    *("train.steps=12", "train.warmup_steps=1", "train.decay_steps=0", "registry.floors={}"),
    *(f"data.scenes.train={SCENES[0]}", f"data.scenes.eval={SCENES[1]}"),
]


def help_seconds() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "orchestration.cli", "--help"], check=True, capture_output=True)
    return time.perf_counter() - began


def start(home: Path, name: str, workers: int) -> dict[str, float]:
    """Seconds of each part and in all, and of the cores. The run is ended after its first step."""
    environment = {**os.environ, "SLOTFORGE_HOME": str(home), "RAY_TMPDIR": str(home / "r"), "PYTHONUNBUFFERED": "1"}
    changes = [*OPTIONS, f"name={name}", f"parallel.workers={{min: {workers}, max: {workers}}}"]
    sets = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-m", "orchestration.train", "--recipe", "tetrominoes", *sets]
    began, ends = time.perf_counter(), list[float]()
    process = psutil.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if MARKS[len(ends)] in line:
                ends.append(time.perf_counter())
            if len(ends) == len(MARKS):
                break
        else:
            raise SystemExit(f"the run told {len(ends)} of {len(MARKS)} marks:\n{''.join(said)[-4000:]}")
        cores = sum(used.user + used.system for used in (one.cpu_times() for one in family(process)))
    finally:
        everyone = family(process)
        for one in everyone:
            one.kill()
        psutil.wait_procs(everyone, timeout=20)
        process.wait()
    parts = [end - before for before, end in zip([began, *ends], ends, strict=False)]
    return {**dict(zip(NAMES, parts, strict=True)), TOTAL: sum(parts), CORES: cores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into BENCHMARKS.md")
    options = parser.parse_args()
    around = machine()
    rows = {"slotforge --help": [help_seconds() for _ in range(options.repeats + 1)][1:]}
    with tempfile.TemporaryDirectory(prefix="sf") as folder:
        home = Path(folder)
        (home / "r").mkdir()
        first = start(home, "rendered", options.workers)
        runs = [start(home, f"start-{number}", options.workers) for number in range(options.repeats)]
    rows |= {name: [run[name] for run in runs] for name in (*NAMES, TOTAL, CORES)}
    rows[f"the first start on a machine besides: rendering {sum(SCENES)} scenes, making MLflow's store"] = [
        first[TOTAL] - statistics.median(rows[TOTAL])
    ]
    lines = [
        f"| {name} | {statistics.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f}) |"
        for name, taken in rows.items()
    ]
    text = "\n".join(
        [
            "## Starting",
            "",
            f"    python -m benchmarks.startup --workers {options.workers} --repeats {options.repeats}",
            "",
            f"Tetrominoes as published, {options.workers} workers, {options.repeats} starts. {around}; "
            f"{versions(*PACKAGES)}.",
            "",
            "| part | seconds: median (spread) |",
            "|---|---|",
            *lines,
        ]
    )
    print(text)
    if options.write:
        write("startup", text)


if __name__ == "__main__":
    main()
