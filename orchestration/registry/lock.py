"""One promotion of a model at a time, wherever it is started: a queue of numbered tickets in the registry itself.

MLflow moves an alias for whoever asks, and compares nothing first. But it gives each version of a registered model a
number of its own, for ever. A ticket is a version of a registered model ``<name>.promotions``, and the lowest one that
is there is the holder's; done, it is deleted. A holder that died is evicted by the next in line after LOCK_SECONDS of
that one's own clock; one that lives has its turn taken from it only after it has stopped itself, at half that time.
"""

import logging
import os
import socket
import time
from types import TracebackType
from typing import Self

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orchestration.tracking import is_absent

logger = logging.getLogger(__name__)

LOCK_SECONDS = 60.0
POLL_SECONDS = 0.2
_BUSY = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR")  # sqlite, while another process writes
_TRIES = 8


class PromotionError(MlflowException):
    """Nothing could be decided; the message says why."""


class PromotionLock:
    """The right to move a model's aliases.

    Args:
        client: of MLflow.
        name: of the registered model.
        seconds: after which a holder counts as dead; the same for everybody.
    """

    def __init__(self, client: MlflowClient, name: str, seconds: float = LOCK_SECONDS) -> None:
        self._client, self._name, self._seconds = client, name, seconds
        self._queue = f"{name}.promotions"
        self._since = 0.0
        self.ticket = 0

    def __enter__(self) -> Self:
        self._since = time.monotonic()  # before anybody can have seen the ticket
        self._make_queue()
        self.ticket = self._draw()
        try:
            self._wait()
        except BaseException:
            self._withdraw(self.ticket)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._withdraw(self.ticket)
        except MlflowException as problem:  # what was done is done; the ticket runs out
            logger.warning("%s: ticket %d could not be returned (%s)", self._name, self.ticket, problem)

    def check(self) -> None:
        """Asked right before an alias is moved.

        Raises:
            PromotionError: the lock is not this promotion's any more, or soon might not be.
        """
        held = time.monotonic() - self._since
        if held > self._seconds / 2 or min(self._tickets(), default=0) != self.ticket:
            raise PromotionError(
                f"{self._name}: the promotion held its turn for {held:.0f} s, too long to be sure that it still has "
                "it; nothing was moved, say it again"
            )

    def _wait(self) -> None:
        head, seen = 0, time.monotonic()
        while True:
            asked = time.monotonic()
            tickets = self._tickets()
            if self.ticket not in tickets:
                raise PromotionError(f"{self._name}: ticket {self.ticket} was removed from {self._queue}; say it again")
            first = min(tickets)
            if first == self.ticket:
                return
            self._since = asked  # not ours until now
            if first != head:
                head, seen = first, asked
                logger.warning("%s: waiting for %s", self._name, tickets[first])
            elif asked - seen > self._seconds:
                logger.warning("%s: %s is taken for dead, after %.0f s", self._name, tickets[first], self._seconds)
                self._withdraw(first)
            time.sleep(POLL_SECONDS)

    def _make_queue(self) -> None:
        about = f"The queue of promotions and rollbacks of {self._name}: its lowest version is at work."
        try:
            self._client.create_registered_model(self._queue, description=about)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _draw(self) -> int:
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        for attempt in range(_TRIES):
            try:
                ticket = self._client.create_model_version(
                    self._queue, source="slotforge:/ticket", tags={"holder": holder}, await_creation_for=0
                )
                return int(ticket.version)
            except MlflowException as error:
                if error.error_code not in _BUSY or attempt == _TRIES - 1:
                    raise
                time.sleep(POLL_SECONDS * (attempt + 1))
        raise AssertionError

    def _tickets(self) -> dict[int, str]:
        """Who is in the queue."""
        found = self._client.search_model_versions(f"name = '{self._queue}'")
        return {int(ticket.version): ticket.tags.get("holder", "somebody") for ticket in found}

    def _withdraw(self, ticket: int) -> None:
        try:
            self._client.delete_model_version(self._queue, str(ticket))
        except MlflowException as error:
            if not is_absent(error):
                raise
