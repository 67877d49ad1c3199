"""Requests on their way to replicas: those that come while others are on their way go together in one call.

A call of a replica costs some milliseconds, more than a small image does.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from orchestration.serving.answers import JSON, Answer, Work
from orchestration.serving.app import UnavailableError

logger = logging.getLogger(__name__)

TRIES = 3
"""Of a request whose replica died under it: an answer depends on the request alone, so another one may give it."""

MOST_BYTES = 4 * 2**20
"""Of requests that go together: beyond that a call costs little beside what it carries."""


class LostError(Exception):
    """Who was called died before it answered."""


@dataclass
class _Asked:
    """A request on its way."""

    work: Work
    answer: asyncio.Future[Answer]
    tries: int = 0

    @property
    def alone(self) -> bool:
        """Others would wait for its many images, or die with it should it be what the replica died of."""
        return self.work.media == JSON or self.tries > 0


class Calls:
    """Spreads requests over calls.

    Args:
        call: an answer to each of some requests; raises LostError.
        batch: requests that go together, at most.
        at_once: calls at the same time, at most.
    """

    def __init__(self, call: Callable[[list[Work]], Awaitable[list[Answer]]], *, batch: int, at_once: int) -> None:
        self._call, self._batch, self._at_once = call, batch, at_once
        self._waiting: deque[_Asked] = deque()
        self._callers: set[asyncio.Task[None]] = set()

    async def answer(self, work: Work) -> Answer:
        """The answer to a request, of whoever lives to give it.

        Raises:
            UnavailableError: they died one after the other.
            Exception: what the call raised.
        """
        asked = _Asked(work, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if len(self._callers) < self._at_once:
            self._callers.add(asyncio.create_task(self._calling()))
        return await asked.answer

    async def _calling(self) -> None:
        """A call after the other, until nothing waits."""
        while together := self._next():
            try:
                answers = await self._call([asked.work for asked in together])
            except LostError as error:
                logger.warning("%s; its requests go to another", error)
                self._again(together)
            except Exception as error:  # who asked is told, the others go on
                _fail(together, error)
            else:
                for asked, answer in zip(together, answers, strict=True):
                    if not asked.answer.done():
                        asked.answer.set_result(answer)
        # Now, not when the task is over: what is asked in between would take it for a caller that comes by.
        self._callers.discard(asyncio.current_task())

    def _next(self) -> list[_Asked]:
        """What goes in the next call: requests together, up to a batch or to so many bytes, or one that goes alone."""
        together: list[_Asked] = []
        size = 0
        while self._waiting and len(together) < self._batch and not (together and together[0].alone):
            asked = self._waiting[0]
            size += len(asked.work.body)
            if asked.answer.done():  # who asked has gone
                self._waiting.popleft()
            elif together and (asked.alone or size > MOST_BYTES):
                break
            else:
                together.append(self._waiting.popleft())
        return together

    def _again(self, together: list[_Asked]) -> None:
        for asked in together:
            asked.tries += 1
            if asked.tries < TRIES:
                self._waiting.append(asked)
            else:
                _fail([asked], UnavailableError(f"{TRIES} replicas died; try again later"))


def _fail(together: list[_Asked], error: Exception) -> None:
    for asked in together:
        if not asked.answer.done():
            asked.answer.set_exception(error)
