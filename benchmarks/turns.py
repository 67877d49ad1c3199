"""Commands that run by turns of a few seconds, so that what else the machine does hits all alike."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil


@dataclass
class Turn:
    """A command, and when it ran.

    Fields:
        command: started by `alternate`, without a shell.
        output: file for what it prints.
        environment: its variables.
        ends: it comes to an end by itself; others are ended when all such have.
        ran: begin and end of each time it ran, as `time.time` tells.
    """

    command: Sequence[str]
    output: Path
    environment: Mapping[str, str]
    ends: bool = True
    ran: list[tuple[float, float]] = field(default_factory=list)

    def seconds(self, begin: float, end: float) -> float:
        """How long it ran between two moments."""
        return sum(max(0.0, min(end, last) - max(begin, first)) for first, last in self.ran)


def alternate(turns: Sequence[Turn], seconds: float = 2.0) -> None:
    """Runs commands until those that end have: one at a time, with all that they start; the others are stopped.

    Raises:
        SystemExit: one failed; with the end of what it printed.
    """
    processes: list[psutil.Popen] = []
    try:
        for turn in turns:
            with turn.output.open("wb") as output:
                processes.append(
                    psutil.Popen(turn.command, env=turn.environment, stdout=output, stderr=subprocess.STDOUT)
                )
            _stop(processes[-1])
        while any(turn.ends and process.poll() is None for turn, process in zip(turns, processes, strict=True)):
            for turn, process in zip(turns, processes, strict=True):
                if process.poll() is None:
                    begin = time.time()
                    for one in reversed(family(process)):
                        one.resume()
                    _wait(process, seconds)
                    _stop(process)
                    turn.ran.append((begin, time.time()))
        for turn, process in zip(turns, processes, strict=True):
            if process.poll():
                raise SystemExit(f"{' '.join(turn.command[:8])} ...\n{turn.output.read_text()[-6000:]}")
    finally:
        for process in processes:
            for one in family(process):
                one.kill()
            process.wait()


def _wait(process: psutil.Popen, seconds: float) -> None:
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        return


def _stop(process: psutil.Popen) -> None:
    """Parents first, and again until nobody new is found: a process that is stopped starts no others."""
    stopped: set[int] = set()
    while new := [one for one in family(process) if one.pid not in stopped]:
        for one in new:
            stopped.add(one.pid)
            try:
                one.suspend()
            except psutil.NoSuchProcess:
                continue


def family(process: psutil.Process | psutil.Popen) -> list[psutil.Process]:
    """A process and all that come from it and live, parents first; nobody once it has ended."""
    try:
        everyone = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return [one for one in everyone if _lives(one)]


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
