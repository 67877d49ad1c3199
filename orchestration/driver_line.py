"""What a rank says to the driver, and what it hears from there, by way of the mailbox."""

import logging
import time
from collections.abc import Callable
from typing import Any

import ray

from orchestration.mailbox import Request
from orchestration.recovery import recovery_parts
from orchestration.worker import StepReport

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5  # between words with the driver


class DriverLine:
    """Rank 0's line to the driver: shows values, hears what is asked, twice a second at most, and never waits."""

    def __init__(self, mailbox: Any, world: int, now: Callable[[], float] = time.monotonic) -> None:
        self._mailbox, self._world, self._now = mailbox, world, now
        self._last = 0.0
        self._answer: Any = None
        self._request: Request | None = None

    def show(self, report: StepReport) -> None:
        """A hook of the training loop. Rank 0's mean stands for the batch's: the terminal is not worth a collective."""
        if self._answer is not None or self._now() - self._last < LOOK_SECONDS:
            return
        self._last = self._now()
        values = {
            "when": time.time(),
            "step": report.done,
            "loss": float(report.means[0]) * self._world,
            "kept": float(report.means[3]) * self._world,
            "images_per_second": report.batch_size / report.seconds,
        }
        self._answer = self._mailbox.show.remote(values)

    def warn(self, text: str) -> None:
        """Something that whoever watches the run should know."""
        self._mailbox.happened.remote(time.time(), "warning", text)

    def picture(self, step: int, glimpse: bytes) -> None:
        """What a picture of a step is drawn from; see orchestration.glimpse."""
        self._mailbox.glimpse.remote(step, glimpse)

    def request(self) -> Request | None:
        """What the driver or the controller wants, as far as it has been heard."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._request, self._answer = ray.get(self._answer), None
        return self._request

    def stay(self) -> None:
        """The ranks could not save for a resize. What has been heard until now may still be its wish: ask anew."""
        logger.warning("no resize for now: it could not be saved; training goes on")
        ray.get(self._mailbox.stay.remote())
        self._request = self._answer = None

    def recovery(self) -> dict[str, float]:
        """Seconds of the parts of the restart that has just ended; see orchestration.recovery."""
        return recovery_parts({**ray.get(self._mailbox.marks.remote()), "first step": time.time()})


def log_to(mailbox: Any, rank: int) -> None:
    """The driver shows what is said here; Ray's own log streaming would break its progress bars."""
    handler = _ToMailbox(mailbox, rank)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    for name in ("orchestration", "pipelines"):
        package = logging.getLogger(name)
        package.handlers = [handler]
        package.setLevel(logging.INFO)
        package.propagate = False


class _ToMailbox(logging.Handler):
    def __init__(self, mailbox: Any, rank: int) -> None:
        super().__init__()
        self._mailbox, self._rank = mailbox, rank

    def emit(self, record: logging.LogRecord) -> None:
        self._mailbox.say.remote(self._rank, self.format(record))
