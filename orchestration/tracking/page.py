"""A run's page in MLflow, as its driver fills it: nothing here waits for MLflow but the end."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

from orchestration.events import Event, EventLog, Kind
from orchestration.node_metrics import Sample
from orchestration.recipe import Recipe
from orchestration.runs.checkpoints import committed
from orchestration.runs.folder import RunFolder
from orchestration.tracking.description import Description
from orchestration.tracking.estimate import Estimate
from orchestration.tracking.gallery import Gallery
from orchestration.tracking.happenings import Happenings
from orchestration.tracking.nodes import Nodes
from orchestration.tracking.provenance import Provenance, code
from orchestration.tracking.sender import CLOSE_SECONDS, Cargo, Sender
from orchestration.tracking.tracker import Tracker
from orchestration.wording import counted

End = Literal["FINISHED", "FAILED", "KILLED"]


class Page:
    """Curves, events and pictures, sent by a thread while the run trains; see Sender.

    Args:
        say: shows the user a line, in a style.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, say: Callable[[str, str], None]) -> None:
        self._folder, self._say = folder, say
        self._log, self._gallery = EventLog(folder.storage), Gallery(folder.path / "pictures")
        self._nodes, self._code = Nodes(), code()
        self._provenance = Provenance(recipe, folder.facts["data"], self._code)
        cargoes: list[Cargo] = [
            *(Happenings(self._log), self._provenance, self._gallery, Description(recipe)),
            *(self._nodes, Estimate(recipe)),
        ]
        self._sender = Sender(lambda: Tracker(recipe, folder), cargoes, say)
        self._step, self._closed = 0, False

    def __enter__(self) -> Self:
        self._sender.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._closed:
            self.close("FAILED")

    @property
    def tracker(self) -> Tracker:
        """Once all has arrived."""
        assert self._sender.tracker is not None
        return self._sender.tracker

    def begins(self, step: int, machines: Sequence[Mapping[str, Any]]) -> None:
        """The run begins, or goes on, after so many steps, on these machines."""
        self._provenance.runs_on(machines)
        self._sender.status("RUNNING")
        self.happened(
            Event(time.time(), "start", f"from step {step} on {counted(len(machines), 'node')}, {self._code}", step)
        )

    def happened(self, *events: Event) -> None:
        """Notes events, and shows them."""
        for event in events:
            self._step = max(self._step, event.step)
            style = "yellow" if event.kind == "warning" else "dim"
            self._say(f"{time.strftime('%H:%M:%S', time.localtime(event.when))} {event.text}", style)
        try:
            self._log.add(*events)
        except OSError as error:
            self._say(f"events are not in the run's folder, the next one will try again: {error}", "yellow")

    def picture(self, step: int, glimpse: bytes) -> None:
        """What the pictures of a step are drawn from."""
        try:
            self._gallery.add(step, glimpse)
        except OSError as error:
            self._say(f"there will be no pictures of step {step}: {error}", "yellow")

    def measured(self, node: str, attempt: str, samples: list[Sample]) -> None:
        """What a node was found doing."""
        self._nodes.add(node, attempt, samples)

    def close(self, end: End, seconds: float = CLOSE_SECONDS) -> bool:
        """Sends the rest; whether all of it has arrived. See Sender."""
        self._closed = True
        kind: Kind = "end" if end == "FINISHED" else "stop"
        self.happened(Event(time.time(), kind, end.lower(), max(self._step, newest_step(self._folder))))
        self._gallery.finish()
        return self._sender.close(end, seconds, patient=end == "FINISHED")


def newest_step(folder: RunFolder) -> int:
    """Steps that are done and saved."""
    return max((checkpoint.steps for checkpoint in committed(folder.checkpoints)), default=0)
