"""Numbered things made ahead of time by a thread."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Begun = TypeVar("Begun")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class Prefetcher(Generic[Begun, Made]):
    """Makes things in order in a thread of its own: each is begun, then finished while those behind it are begun.

    Args:
        begin, finish: make a number into a thing, in two parts.
        first: number of the first one.
        ready: things made ahead of time.
        begun: things begun ahead of the one that is finished.
    """

    def __init__(
        self, begin: Callable[[int], Begun], finish: Callable[[Begun], Made], first: int, ready: int, begun: int
    ) -> None:
        self.next = first
        self._begin, self._finish, self._begun = begin, finish, begun
        self._ready: queue.Queue[Made | _Failed] = queue.Queue(maxsize=ready)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first,), name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> Made:
        """The next thing, or the error that its making met; after an error there is nothing more."""
        # The thread always comes to a thing or an error, since all its own waits have an end.
        while True:
            with contextlib.suppress(queue.Empty):
                made = self._ready.get(timeout=1.0)
                if isinstance(made, _Failed):
                    raise made.error
                self.next += 1
                return made
            if not self._thread.is_alive() and self._ready.empty():
                raise RuntimeError("the thread that reads ahead is gone")

    def close(self) -> None:
        """Stop; what is being made is finished, and nobody gets it."""
        self._stop.set()
        while self._thread.is_alive():  # it may be waiting for room
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)
        self._thread.join()

    def _run(self, number: int) -> None:
        begun: deque[Begun] = deque()
        failed: BaseException | None = None
        try:
            while not self._stop.is_set():
                while len(begun) < self._begun and failed is None:
                    try:
                        begun.append(self._begin(number))
                    except BaseException as error:  # in its turn: those before it are good
                        failed = error
                    number += 1
                if failed is not None and not begun:
                    raise failed
                self._ready.put(self._finish(begun.popleft()))
        except BaseException as error:
            self._ready.put(_Failed(error))
