"""Where a driver, its ranks and Ray Train's controller leave word for each other: an actor, no files.

It holds requests to the ranks (save and stop, leave or resize), what rank 0 shows, what stopped the ranks for good, and
the times from which a restart's parts are told. A run's state is not here: that is the run folder's.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestration.events import Event, Kind
from orchestration.profiling.profile import StepProfile

STOP_SECONDS = 60.0  # that the ranks have to save before they are stopped
SEND_SECONDS = 15.0  # that a driver which stops then gives MLflow to take the rest; it waits in the run's folder

RESIZE_SECONDS = 60.0  # from a resize that could not be saved to the next try

Request = Literal["stop", "leave", "resize"]
"""stop: save, and end the run for now. leave: save if that can be, and let the workers be started anew: a node goes.
resize: save, and then let the workers be started anew at another size; or go on where it cannot be saved."""


class TrainingError(Exception):
    """Training has stopped for good; the message says why."""


class Stopped(Exception):
    """The ranks have saved and stopped, as they were asked."""


class Leaving(Exception):
    """The ranks have saved, where they could, and leave for workers that start anew; the message says why."""


@dataclass(frozen=True)
class Failure:
    """What a restart would only repeat.

    Fields:
        error, message: its name and its words.
        facts: a diagnosis, where there is one.
    """

    error: str
    message: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class News:
    """What a driver has not seen yet.

    Fields:
        live: values of the newest step, for the terminal; empty before the first.
        lines: (rank, line) of the ranks' logs.
        events: restarts, resizes and the like.
        glimpses: (step, bytes) for pictures; see orchestration.glimpse.
        samples: (node, attempt, samples) of its metrics; see orchestration.node_metrics.
        stopped: whether the ranks have saved and stopped, as they were asked.
        failure: what stopped them for good.
        micro_batch: the largest micro batch that has not run out of memory, where one did.
        profile, trace: of rank 0's steps, where it was asked for them; see orchestration.profiling.
    """

    live: dict[str, float] = field(default_factory=dict)
    lines: list[tuple[int, str]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    glimpses: list[tuple[int, bytes]] = field(default_factory=list)
    samples: list[tuple[str, str, list[Any]]] = field(default_factory=list)
    stopped: bool = False
    failure: Failure | None = None
    micro_batch: int | None = None
    profile: StepProfile | None = None
    trace: bytes | None = None


class Mailbox:
    """The actor's class; ``open_mailbox`` starts it."""

    def __init__(self, micro_batch: int | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._request: Request | None = None
        self._no_resize_until = now()
        self._news = News(micro_batch=micro_batch)
        self._marks: dict[str, float] = {}
        self._steps = 0
        self._micro_batch = 0

    def starting(self) -> None:
        """The controller starts workers: those who were asked to leave have gone.

        It is the controller's word, since its later requests come after it. By the ranks' own word, which comes when
        they have loaded, a node's notice from the seconds before would be forgotten.
        """
        if self._request != "stop":
            self._request = None

    def attempt(self, micro_batch: int) -> None:
        """Ranks begin, with micro batches of so many samples."""
        self._micro_batch = micro_batch

    def steps(self) -> int:
        """The most steps that have been shown."""
        return self._steps

    def ask(self, request: Request) -> None:
        """The driver or the controller wants something of the ranks. A stop is not taken back by a leave."""
        if self._request != "stop":
            self._request = request

    def resize(self, when: float, text: str) -> None:
        """The controller would like another number of workers. It asks at each of its looks: the first one counts."""
        if self._request is None and self._now() >= self._no_resize_until:
            self._request = "resize"
            self.happened(when, "resize", text)

    def stay(self) -> None:
        """The ranks could not save for a resize, and go on as they are: not again for a while."""
        if self._request == "resize":
            self._request = None
        self._no_resize_until = self._now() + RESIZE_SECONDS

    def request(self) -> Request | None:
        return self._request

    def stopped(self) -> None:
        """The ranks have saved, and stop."""
        self._news.stopped = True

    def show(self, values: dict[str, float]) -> Request | None:
        """Rank 0's newest values; returns what is asked of the ranks."""
        self._news.live = values
        self._steps = max(self._steps, int(values["step"]))
        self._marks["last step"] = values["when"]
        return self._request

    def say(self, rank: int, line: str) -> None:
        self._news.lines.append((rank, line))

    def happened(self, when: float, kind: Kind, text: str) -> None:
        self._news.events.append(Event(when, kind, text, self._steps))

    def glimpse(self, step: int, content: bytes) -> None:
        self._news.glimpses.append((step, content))

    def measured(self, node: str, attempt: str, samples: list[Any]) -> None:
        self._news.samples.append((node, attempt, samples))

    def profiled(self, profile: StepProfile, trace: bytes | None) -> None:
        self._news.profile, self._news.trace = profile, trace

    def fail(self, failure: Failure) -> None:
        """The first one counts; those after it follow from it."""
        if self._news.failure is None:
            self._news.failure = failure

    def out_of_memory(self) -> int | None:
        """A micro batch was too large: from now on half of it is the most. Returns the new limit, None at the end."""
        if self._micro_batch <= 1:
            return None
        self._news.micro_batch = self._micro_batch // 2
        return self._news.micro_batch

    def micro_batch(self) -> int | None:
        return self._news.micro_batch

    def mark(self, name: str, when: float) -> None:
        """A moment on the way from a fault to the next step; see orchestration.recovery.

        Where a restart takes several tries, the fault is the first one, and the rest is of the try that succeeds.
        """
        if name != "detected" or name not in self._marks:
            self._marks[name] = when

    def marks(self) -> dict[str, float]:
        """The moments of the last restart; the next one starts anew."""
        marks, self._marks = self._marks, {}
        return marks

    def news(self) -> News:
        """For the driver: what it has not seen yet."""
        news = self._news
        self._news = News(live=news.live, stopped=news.stopped, failure=news.failure, micro_batch=news.micro_batch)
        return news


def open_mailbox(micro_batch: int | None = None) -> Any:
    """Starts the actor on this node, where the driver is: one does not outlive the other.

    Args:
        micro_batch: the limit that an earlier driver of this run has found.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote(micro_batch)
