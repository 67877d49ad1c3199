"""How much of a run's time is training, where workers and drivers are killed at random.

    make soak                                        an hour of faults
    python -m benchmarks.soak --minutes 10 --seed 3  --write

Goodput is the time that the run's steps would take if each were as fast as the best ones, over the time that it took:
steps x the best step / wall time; by the median step it is told as well. Faults are drawn from the seed: which, and
when. At the end every step must have seen the plan's batch, and every point of the curve must be there once.
"""

import argparse
import contextlib
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("tests", "tests/system")]

import ledgers
import psutil
from rich.console import Console
from runs import Run, kill_everything, workers

from benchmarks.page import write
from orchestration.train import INTERRUPTED

EVERY_SECONDS = 90.0  # between faults, on average
STEP_SECONDS = 0.04  # about, for the number of steps that fill the time
ACTIONS = {"a worker": 5, "both workers": 2, "the driver": 1, "Ctrl-C": 1, "a pause of a worker": 1}
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the result into BENCHMARKS.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as home:
        text = soak(Path(home), arguments.minutes * 60, random.Random(arguments.seed))  # noqa: S311 not a secret
    console.print(text)
    if arguments.write:
        write("soak", text)


def soak(home: Path, seconds: float, chance: random.Random) -> str:
    """Runs, disturbs and checks; returns the words for BENCHMARKS.md."""
    ledger = home / "ledger"
    steps = round(seconds / STEP_SECONDS)
    changes = (
        f"train.steps={steps}",
        "train.checkpoint_every=null",
        f"train.mtbf_hours={EVERY_SECONDS / 3600}",  # of the one node that both workers are on
        f"data.ledger={ledger}",
        "evaluate.every=100000",
    )
    run = Run(home, "soak", changes)
    faults: Counter[str] = Counter()
    output: list[str] = []
    driver = _started(run, output)
    began = time.monotonic()
    while (left := seconds - (time.monotonic() - began)) > 0 and driver.poll() is None:
        quiet = chance.expovariate(1 / EVERY_SECONDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(min(quiet, left))  # it may be done before
        if quiet > left or driver.poll() is not None:
            break
        (fault,) = chance.choices(list(ACTIONS), list(ACTIONS.values()))
        victims = workers(driver)
        if not victims:
            continue
        faults[fault] += 1
        console.print(f"{time.monotonic() - began:6.0f} s, step {run.newest_step()}: {fault}")
        if fault in ("a worker", "both workers", "a pause of a worker"):
            one = chance.choice(victims)
            for victim in victims if fault == "both workers" else [one]:
                with contextlib.suppress(psutil.NoSuchProcess):  # it was being replaced just then
                    victim.suspend() if fault == "a pause of a worker" else victim.kill()
        else:
            if fault == "Ctrl-C":
                driver.send_signal(2)
                driver.wait(180)
            else:
                kill_everything(driver)
            driver = _started(run, output)
    if driver.poll() is None:
        driver.send_signal(2)
        driver.wait(180)
    if driver.returncode not in (0, INTERRUPTED):
        raise SystemExit(f"the run ended with exit code {driver.returncode}:\n{''.join(output[-20:])}")
    wall = time.monotonic() - began

    done = run.newest_step()
    ledgers.check(ledger, str(home / "chain.yaml"), list(changes), next(home.glob("data/*/train")), until=done)
    taken = [value for _, value in run.points("time/step")]
    best, median = min(taken), statistics.median(taken)
    expected = list(range(10, done + 1, 10))
    points = [step for step, _ in run.points("loss/total") if step <= done]
    if points != expected:
        raise SystemExit(f"the curve has gaps or doubles: {len(points)} points, {len(expected)} expected")
    back = [float(match) for match in re.findall(r"back after ([\d.]+) s", "".join(output))]
    usual, worst = (statistics.median(back), max(back)) if back else (math.nan, math.nan)
    again = sum(attempt.last + 1 - attempt.start for attempt in ledgers.attempts(ledger)) - done
    told = ", ".join(f"{count} x {fault}" for fault, count in sorted(faults.items()))
    return (
        f"{wall / 60:.0f} minutes, {sum(faults.values())} faults ({told}): {done} steps, "
        f"{1000 * best:.0f} ms at best, {1000 * median:.0f} ms in the median: "
        f"**goodput {100 * done * best / wall:.0f} %** ({100 * done * median / wall:.0f} % by the median). "
        f"{again} steps were done again. Back to the next step after {usual:.1f} s in the median, {worst:.1f} s at "
        "most. Every step saw the plan's batch, and every point of the curve "
        "is there once.\n"
    )


def _started(run: Run, output: list[str]) -> "subprocess.Popen[str]":
    driver = run.start()

    def read() -> None:
        assert driver.stdout is not None
        output.extend(driver.stdout)

    threading.Thread(target=read, daemon=True).start()
    return driver


if __name__ == "__main__":
    main()
