"""On its way to MLflow: a thread that sends, so that nothing else waits for MLflow."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self

from mlflow.exceptions import MlflowException

from orchestration.tracking.tracker import Tracker

LOOK_SECONDS = 2.0  # between looks for something to send
RETRY_SECONDS = (1.0, 60.0)  # after a failure: the first pause, and the longest
FIRST_SECONDS = 15.0  # that a run's start waits for MLflow's first answer
CLOSE_SECONDS = 60.0  # that its end waits for the rest to be sent
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""Of one request, while a run trains: MLflow's own take minutes, and whoever sends will try again anyway."""
OUTAGES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED")
"""What MLflow's errors are called when it may take later what it does not take now."""


class Cargo(Protocol):
    """Something that goes to MLflow, bit by bit."""

    def deliver(self, tracker: Tracker) -> None:
        """Sends what has not been sent; sent twice, nothing is there twice."""


class Curves:
    """The points of committed checkpoints."""

    def deliver(self, tracker: Tracker) -> None:
        tracker.send_committed()


class Sender:
    """Sends what a run has to show, in a thread and in the order it is given, for as long as it takes.

    An MLflow that is down or slow costs a warning. Nothing is lost by it: what is to be sent lies in the run's folder,
    points in checkpoints that are not pruned, and whoever goes on with the run sends the rest.

    Args:
        connect: makes the tracker; called until it does.
        cargoes: what is sent beside the curves.
        say: shows the user a line, in a style.

    Raises:
        MlflowException: on entering: MLflow answers, and refuses.
    """

    def __init__(
        self, connect: Callable[[], Tracker], cargoes: Sequence[Cargo], say: Callable[[str, str], None]
    ) -> None:
        self._connect, self._say = connect, say
        self._cargoes: list[Cargo] = [Curves(), *cargoes]
        self.tracker: Tracker | None = None
        self._status: str | None = None  # wanted
        self._told: str | None = None  # that MLflow has
        self._closing, self._answered = threading.Event(), threading.Event()
        self._refusal: MlflowException | None = None
        self._error: BaseException | None = None
        self._outage = ""
        self._delivered = False
        self._limits = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)

    def __enter__(self) -> Self:
        self._limits.enter_context(_limited())
        self._thread.start()
        self._answered.wait(FIRST_SECONDS)
        problem = self._refusal or self._error
        if problem is not None:
            self._limits.close()
            raise problem
        return self

    def __exit__(self, *_: object) -> None:
        if not self._closing.is_set():
            self.close("FAILED")

    def status(self, status: str) -> None:
        """The run is RUNNING, FINISHED, FAILED or KILLED."""
        self._status = status

    def close(self, status: str, seconds: float = CLOSE_SECONDS, *, patient: bool = False) -> bool:
        """Sends the rest and the last status, and ends.

        Args:
            seconds: that this may take.
            patient: it may take longer, as long as MLflow takes what it is given.

        Returns:
            whether all of it has arrived; if not, the user is told where it waits.

        Raises:
            Exception: of another kind than an outage: a defect, for which the thread had ended.
        """
        self.status(status)
        self._closing.set()
        self._thread.join(seconds)
        while patient and self._thread.is_alive() and not self._outage:
            self._thread.join(LOOK_SECONDS)
        self._limits.close()
        if self._error is not None:
            raise self._error
        if not self._delivered:
            self._say(
                f"MLflow has not taken everything ({self._outage or f'not in {seconds:.0f} s'}); nothing is lost: it "
                "waits in the run's folder, and the same command sends it",
                "yellow",
            )
        return self._delivered

    def _run(self) -> None:
        pause = RETRY_SECONDS[0]
        try:
            while True:
                last = self._closing.is_set()  # before looking: what is there by then is sent
                if self._deliver():
                    if last:
                        self._delivered = True
                        return
                    pause = RETRY_SECONDS[0]
                    self._closing.wait(LOOK_SECONDS)
                elif self._refusal is not None:
                    return
                elif last:
                    time.sleep(RETRY_SECONDS[0])
                else:
                    self._closing.wait(pause)
                    pause = min(2 * pause, RETRY_SECONDS[1])
        except BaseException as error:  # raised again by close
            self._error = error
            self._say(f"nothing goes to MLflow any more: {type(error).__name__}: {error}", "red")
        finally:
            self._answered.set()

    def _deliver(self) -> bool:
        """Sends what there is; False: some of it has to wait."""
        failures = []
        try:
            if self.tracker is None:
                self.tracker = self._connect()
            self._answered.set()
            for cargo in self._cargoes:
                try:
                    cargo.deliver(self.tracker)
                except (MlflowException, OSError) as error:
                    failures.append(error)
                    if isinstance(cargo, Curves):
                        break  # the others' time-outs would only add to it
            if not failures and self._told != self._status:
                wanted = self._status
                assert wanted is not None
                self.tracker.status(wanted)
                self._told = wanted
        except (MlflowException, OSError) as error:
            first = not self._answered.is_set()
            if first and isinstance(error, MlflowException) and error.error_code not in OUTAGES:
                self._refusal = error
                return False
            failures.append(error)
            self._answered.set()
        self._tell(failures[0] if failures else None)
        return not failures

    def _tell(self, failure: Exception | None) -> None:
        """The user, when an outage begins and when it ends."""
        before, self._outage = self._outage, "" if failure is None else _one_line(failure)
        if self._outage and not before:
            self._say(f"MLflow does not take everything now, training goes on and it waits: {self._outage}", "yellow")
        if before and not self._outage:
            self._say("MLflow takes everything again", "dim")


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """LIMITS in this process's environment, where MLflow looks at each request; the user's own come first."""
    ours = [name for name in LIMITS if name not in os.environ]
    os.environ.update({name: LIMITS[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _one_line(error: Exception, most: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[:most]}..."
