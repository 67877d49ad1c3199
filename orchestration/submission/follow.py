"""A job's log as it is written, over a connection that comes and goes, to the job's end."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

QUIET_SECONDS = 20.0
"""Without news of a job, after which it is asked whether the connection still is one."""
ANSWER_SECONDS = 20.0
PATIENCE_SECONDS = 900.0
"""Without an answer, after which the job is left to itself."""
LONGEST_WAIT = 30.0
LAST_TRIES = 2

T = TypeVar("T")


class Jobs(Protocol):
    """The part of ray.job_submission.JobSubmissionClient that is used here."""

    def get_job_info(self, job_id: str) -> Any: ...

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...

    def stop_job(self, job_id: str) -> bool: ...


class End(Enum):
    """How following a job ended."""

    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    LOST = "LOST"  # the cluster does not know the job any more: its head was started anew
    UNREACHABLE = "UNREACHABLE"  # nobody answers
    LEFT = "LEFT"  # the user went


@dataclass(frozen=True)
class Outcome:
    """A job's fate; the exit code of its driver, if it came to one; what Ray says about it."""

    end: End
    exit_code: int | None = None
    message: str = ""


class _Disconnected(Exception):
    """No answer, or one that says nothing about the job."""


class _NoSuchJobError(Exception):
    """The cluster does not know the job."""


class Follower:
    """Follows one job.

    The log is read from its beginning at each connection, and shown from where it was. Ctrl-C asks the job to stop,
    which saves first, and goes on following; a second one leaves.

    Args:
        client: Ray's.
        job_id: of the job.
        show: gets the text of the log, each piece once.
        tell: gets sentences about the connection and the stop.
        sleep, now: a clock.
    """

    def __init__(
        self,
        client: Jobs,
        job_id: str,
        show: Callable[[str], None],
        tell: Callable[[str], None],
        *,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._id, self._show, self._tell = client, job_id, show, tell
        self._sleep, self._now = sleep, now
        self._shown = 0  # characters
        self._answered = now()  # when the cluster was heard of last
        self._asked_to_stop = False

    def follow(self) -> Outcome:
        """Until the job's end, or nobody answers for long."""
        while True:
            try:
                return self._follow()
            except KeyboardInterrupt:
                if self._asked_to_stop:
                    return Outcome(End.LEFT)
                self._asked_to_stop = True
                self._tell(f"asking {self._id} to stop: it saves first; once more leaves it to itself")

    def _follow(self) -> Outcome:
        tries, at_the_end, stopping = 0, 0, False
        self._answered = self._now()
        while True:
            before, trouble = self._shown, None
            try:
                if self._asked_to_stop and not stopping:
                    _answer(lambda: self._client.stop_job(self._id))
                    stopping = True
                trouble = self._read_log()
                info = _answer(lambda: self._client.get_job_info(self._id))
                self._answered = self._now()
                if info.status.is_terminal():
                    # A log that ended before the job may have ended early: it is read once more. One that breaks off
                    # is worth some tries, but not many: its node may be gone.
                    if at_the_end > 0 and (trouble is None or at_the_end > LAST_TRIES):
                        return Outcome(End(info.status.value), info.driver_exit_code, info.message or "")
                    at_the_end += 1
                    if trouble is None:
                        continue
            except _Disconnected as error:
                trouble = str(error)
            except _NoSuchJobError as error:
                return Outcome(End.LOST, message=str(error))
            if self._shown > before:
                tries = 0
            if trouble is not None and tries == 0:
                self._tell(f"the connection is lost, trying again ({trouble})")
            if self._now() - self._answered > PATIENCE_SECONDS:
                return Outcome(End.UNREACHABLE, message=trouble or "")
            self._sleep(wait_before(tries))
            tries += 1

    def _read_log(self) -> str | None:
        """Shows what is new until the server ends the log, or until it breaks off: why."""
        position = 0
        try:
            for text in _tail(self._client, self._id):
                self._answered = self._now()  # a log may be followed for days before it breaks off
                new = text[max(0, self._shown - position) :]
                position += len(text)
                if new:
                    self._shown = position
                    self._show(new)
        except _Disconnected as error:
            return str(error)
        return None


def wait_before(tries: int) -> float:
    """Seconds before the next try: they double, up to half a minute."""
    return float(min(2**tries, LONGEST_WAIT))


def _tail(client: Jobs, job_id: str) -> Iterator[str]:
    """The log from its beginning, until the server ends it; "" where it is silent and the server answers.

    Raises:
        _Disconnected: the connection broke, or is silent and the server does not answer either.
        _NoSuchJobError: there is no such job.
    """
    news: queue.Queue[str | Exception | None] = queue.Queue()

    async def read() -> None:
        async for text in client.tail_job_logs(job_id):
            news.put(text)

    def run() -> None:
        try:
            asyncio.run(read())
        except Exception as error:  # handed on to the thread that waits
            news.put(error)
        else:
            news.put(None)

    # A thread of its own: a dead connection may never come back to us.
    threading.Thread(target=run, name="job-log", daemon=True).start()
    while True:
        try:
            found = news.get(timeout=QUIET_SECONDS)
        except queue.Empty:
            if _answer(lambda: client.get_job_info(job_id)).status.is_terminal():
                raise _Disconnected("the log does not go on") from None
            found = ""
        if found is None:
            return
        if isinstance(found, Exception):
            raise _meaning(found) from found
        yield found


def _answer(ask: Callable[[], T]) -> T:
    """What a question to the server gives, in time: Ray's client knows no time limit.

    Raises:
        _Disconnected: no answer.
        _NoSuchJobError: there is no such job.
    """
    answers: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:  # handed on
            answers.put((None, error))

    threading.Thread(target=run, name="job-question", daemon=True).start()
    try:
        found, error = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise _Disconnected("no answer") from None
    if error is not None:
        raise _meaning(error) from error
    return found  # type: ignore[return-value]


def _meaning(error: Exception) -> Exception:
    """Ray's client raises RuntimeError for whatever the server says; only a job that is not there is final."""
    said = " ".join(str(error).split())
    if "status code 404" in said:
        return _NoSuchJobError(said)
    return _Disconnected(said or type(error).__name__)
