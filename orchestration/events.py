"""What happened to a run: restarts, resizes, warnings. Kept in its folder, whoever drives it."""

import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from orchestration.runs.storage import Storage

Kind = Literal["start", "workers", "resize", "preemption", "restart", "failure", "memory", "stop", "warning", "end"]
"""start: a driver begins. end, stop: the run is done; it has failed, or was stopped. workers: the ranks are there.
restart: they leave as they were asked, and start anew. failure, memory: because one failed, or ran out of memory."""

FILE = "events.jsonl"
COUNTED: dict[str, tuple[Kind, ...]] = {
    "drivers": ("start",),
    "restarts": ("restart", "failure", "memory"),
    "failures": ("failure",),
    "resizes": ("resize",),
    "preemptions": ("preemption",),
    "warnings": ("warning",),
}
"""What is counted, by the kinds that count."""


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Fields:
        when: seconds since the epoch.
        step: the newest step that the driver knew of; 0 where it knew of none.
    """

    when: float
    kind: Kind
    text: str
    step: int = 0

    def line(self) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.when))
        return json.dumps({"time": when, "step": self.step, "kind": self.kind, "text": self.text})


class EventLog:
    """All events of a run as lines of JSON, oldest first.

    Args:
        folder: the run's; events of drivers before are in its events.jsonl.
    """

    def __init__(self, folder: Storage) -> None:
        self._folder = folder
        try:
            self.lines = folder.read(FILE).decode().splitlines()
        except FileNotFoundError:
            self.lines = []

    def add(self, *events: Event) -> None:
        """Notes events.

        Raises:
            OSError: the folder cannot be written; the next call notes them too.
        """
        self.lines = [*self.lines, *(event.line() for event in events)]
        self._folder.write(FILE, self.text().encode())

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)

    def counts(self) -> dict[str, int]:
        """How often there was what COUNTED names."""
        kinds = Counter(json.loads(line)["kind"] for line in self.lines)
        return {name: sum(kinds[kind] for kind in counted) for name, counted in COUNTED.items()}
