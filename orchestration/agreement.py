"""What all ranks do after the same step, and how they end there: rank 0 decides, the others hear of it in time."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from orchestration.mailbox import Leaving, Stopped
from orchestration.wording import counted

Pause = Literal["save", "stop", "leave", "resize"]
ANSWER_SECONDS = 60.0  # that rank 0 may take to answer the others


def open_board(rank: int, world: int, address: str, agree: Callable[[Callable[[], Any]], Any]) -> TCPStore | None:
    """A store that the ranks share, held by rank 0; None for a rank alone.

    Args:
        rank, world: this rank, and how many there are.
        address: rank 0's address, as the others reach it.
        agree: gives every rank what rank 0 decides; all ranks call it together.
    """
    if world == 1:
        return None
    patience = timedelta(seconds=ANSWER_SECONDS)
    store = None
    if rank == 0:
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=patience)
    host, port = agree(lambda: (address, store.port if store else 0))
    return store or TCPStore(host, port, is_master=False, timeout=patience)


def departure(pause: Pause, done: int, newest: int, saved: bool) -> Stopped | Leaving | None:
    """How the ranks end when the save of a pause is over; None: they go on.

    Args:
        pause: what it was for.
        done: steps that are done.
        newest: steps of the newest checkpoint.
        saved: whether this save succeeded.
    """
    if pause == "save" or (pause == "resize" and not saved):
        return None
    if pause == "stop":
        return Stopped()
    if saved:
        return Leaving(f"saved at step {done}")
    return Leaving(
        f"step {done} could not be saved: {counted(done - newest, 'step')} after step {newest} will be done again"
    )


class Agreement:
    """Tells every rank after each step whether to save there, and what to do then.

    Rank 0 alone decides, and says on the board what comes after the next step. Nobody ends that step without rank 0's
    part of its gradient, so all have heard of it by its end: asking costs a rank one round trip a step, and no
    collective. Rank 0 outlives the others' last question, since its commit waits for their parts.

    Args:
        board: what the ranks share; None for a rank alone.
        rank: this rank.
        start: steps done already.
        decide: rank 0's wish, given the number of steps that will be done by then; None: just go on.
    """

    def __init__(self, board: TCPStore | None, rank: int, start: int, decide: Callable[[int], Pause | None]) -> None:
        self._board, self._rank, self._decide = board, rank, decide
        self._said = 0
        self._next: tuple[int, Pause] | None = None
        if rank == 0:
            self._say(start + 1)

    def after(self, done: int) -> Pause | None:
        """What all ranks do after ``done`` steps; each asks after every step."""
        if self._rank > 0:
            self._hear()
        due = self._next[1] if self._next is not None and self._next[0] == done else None
        if due is not None:
            self._next = None
        if self._rank == 0 and due in (None, "save"):
            self._say(done + 1)
        return due

    def _say(self, done: int) -> None:
        pause = self._decide(done)
        if pause is None:
            return
        self._next = (done, pause)
        if self._board is not None:
            key = f"pause/{self._said}"
            self._board.set(key, f"{done} {pause}")
            self._board.get(key)  # setting waits for no answer: only this says that the others can see it
        self._said += 1

    def _hear(self) -> None:
        assert self._board is not None
        key = f"pause/{self._said}"
        if self._next is None and self._board.check([key]):
            done, pause = self._board.get(key).decode().split()
            self._next = (int(done), pause)  # type: ignore[assignment]
            self._said += 1
