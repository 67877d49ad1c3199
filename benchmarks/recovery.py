"""How long a run is away after a kill -9: of a worker, and of a whole node; and where the time goes.

    python -m benchmarks.recovery --repeats 3 --write

Two workers on this machine's cores. The workers' times are of one Ray of the driver's own; the nodes' of a cluster of
raylets on this machine, of which the one that dies is not waited for: the run goes on with one worker.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("tests", "tests/system")]

from nodes import Nodes
from runs import Run, kill_everything, wait, workers

from benchmarks.page import machine, write

BACK = re.compile(r"back after [\d.]+ s: (.*)")
LONG = ("train.steps=100000", "train.checkpoint_every=50", "evaluate.every=100000")


class Watched:
    """A driver whose words are read while it runs."""

    def __init__(self, driver: "subprocess.Popen[str]") -> None:
        self.driver, self._words = driver, []  # type: ignore[var-annotated]
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def output(self) -> str:
        return "".join(self._words)

    def back(self, count: int) -> dict[str, float]:
        """The parts of the restart that is the ``count``-th, once it is over."""
        wait(lambda: len(BACK.findall(self.output)) >= count or self.driver.poll() is not None)
        if self.driver.poll() is not None:
            raise SystemExit(f"the run has ended:\n{self.output}")
        parts = BACK.findall(self.output)[count - 1].split(", ")
        return {part.rpartition(" ")[0]: float(part.rpartition(" ")[2]) for part in parts}

    def _read(self) -> None:
        assert self.driver.stdout is not None
        self._words.extend(self.driver.stdout)


def of_workers(home: Path, repeats: int) -> list[dict[str, float]]:
    run = Run(home, "workers", LONG)
    driver = run.start()
    watched, found = Watched(driver), []
    try:
        for number in range(repeats):
            wait(lambda: run.newest_step() >= 100 * (number + 1) or driver.poll() is not None)  # noqa: B023 at once
            workers(driver)[number % 2].kill()
            found.append(watched.back(number + 1))
    finally:
        kill_everything(driver)
    return found


def of_nodes(home: Path, repeats: int) -> list[dict[str, float]]:
    found = []
    for number in range(repeats):
        with Nodes(Path(tempfile.mkdtemp(prefix="away-"))) as cluster:
            ledger = home / f"ledger-{number}"
            cluster.add("first")
            second = cluster.add("second")
            elastic = ("parallel.workers={min: 1, max: 2}", f"data.ledger={ledger}")
            run = Run(home, f"nodes{number}", LONG + elastic, cluster.environment)
            driver = run.start()
            watched = Watched(driver)
            try:
                wait(lambda: run.newest_step() >= 100 or driver.poll() is not None)  # noqa: B023 at once
                if len(list(ledger.glob("*-rank-*.txt"))) != 2:
                    raise SystemExit("the run has not got both nodes")
                second.kill()
                found.append(watched.back(1))
            finally:
                kill_everything(driver)
        shutil.rmtree(cluster.home)
    return found


def table(kinds: dict[str, list[dict[str, float]]]) -> str:
    """Medians of each part, and the spread of all, in Markdown."""
    names = list(dict.fromkeys(name for found in kinds.values() for parts in found for name in parts))
    lines = [f"| kill -9 of | away, s (spread) | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for kind, found in kinds.items():
        away = sorted(sum(parts.values()) for parts in found)
        each = " | ".join(f"{statistics.median(parts.get(name, 0.0) for parts in found):.1f}" for name in names)
        lines.append(f"| {kind} | {statistics.median(away):.1f} ({away[0]:.1f} to {away[-1]:.1f}) | {each} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into BENCHMARKS.md")
    options = parser.parse_args()
    around = machine()
    with tempfile.TemporaryDirectory(prefix="away-") as name:
        home = Path(name)
        kinds = {"a worker": of_workers(home, options.repeats), "a node": of_nodes(home, options.repeats)}
    text = (
        f"## How long a run is away\n\n    python -m benchmarks.recovery --repeats {options.repeats}\n\n"
        "From the last step before to the first one after, two workers; medians of the parts in seconds. "
        f"{around}. "
        "The steps since the last checkpoint are done again besides.\n\n" + table(kinds)
    )
    print(text)
    if options.write:
        write("recovery", text)


if __name__ == "__main__":
    main()
