"""All ranks pause after the same step, whenever rank 0 decides it."""

import threading
import time
from typing import Any

import pytest

from orchestration.agreement import Agreement, Pause, departure, open_board
from orchestration.mailbox import Leaving, Stopped

PATIENCE = 300  # seconds that a busy machine may take for a step


class LateBoard:
    """torch's store on a bad day: what is set arrives a while later, though in order with all else on this line."""

    def __init__(self, board: Any) -> None:
        self._board, self._set = board, threading.Thread()

    def set(self, key: str, value: str) -> None:
        def late() -> None:
            time.sleep(0.05)
            self._board.set(key, value)

        self._arrived()
        self._set = threading.Thread(target=late)
        self._set.start()

    def get(self, key: str) -> bytes:
        self._arrived()
        return bytes(self._board.get(key))

    def _arrived(self) -> None:
        if self._set.ident is not None:
            self._set.join()


def run(
    world: int, wishes: dict[int, Pause], steps: int = 12, start: int = 0, late: bool = False
) -> list[list[tuple[int, Pause | None]]]:
    """What each of some ranks did after each of its steps, in step with each other as a gradient's reduction keeps
    them. ``wishes``: what rank 0 wants after which step; ``late``: its line to the board is slow."""
    barrier, end, decided = threading.Barrier(world), threading.Barrier(world), []
    told: list[list[tuple[int, Pause | None]]] = [[] for _ in range(world)]

    def body(rank: int) -> None:
        def agree(decide: Any) -> Any:
            if rank == 0:
                decided.append(decide())
            barrier.wait(PATIENCE)
            return decided[0]

        board: Any = open_board(rank, world, "127.0.0.1", agree)
        if late and rank == 0:
            board = LateBoard(board)
        agreement = Agreement(board, rank, start, wishes.get)
        for step in range(start + 1, start + steps + 1):
            barrier.wait(PATIENCE)  # the reduction of this step's gradient
            time.sleep(0.001 * ((step * (rank + 1)) % 4))
            told[rank].append((step, agreement.after(step)))
            if told[rank][-1][1] in ("stop", "leave"):
                break
        end.wait(PATIENCE)  # rank 0 outlives the others' last question

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    return told


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {1: "save"},
        dict.fromkeys(range(1, 13), "save"),
        {3: "save", 4: "stop", 5: "save"},
        {2: "leave"},
        {6: "save", 12: "stop"},
        {3: "resize", 5: "save", 8: "leave"},
    ],
    ids=["none", "first", "every", "save then stop", "leave", "at the end", "a resize that was not saved"],
)
def test_every_rank_does_what_rank_0_wants_after_the_same_step(world: int, wishes: dict[int, Pause]) -> None:
    last = min((step for step, pause in wishes.items() if pause in ("stop", "leave")), default=12)
    assert run(world, wishes) == [[(step, wishes.get(step)) for step in range(1, last + 1)]] * world


def test_what_rank_0_says_is_there_before_the_others_look() -> None:
    wishes: dict[int, Pause] = {1: "save", 2: "save", 5: "leave"}
    assert run(3, wishes, late=True) == [[(step, wishes.get(step)) for step in range(1, 6)]] * 3


def test_a_resumed_run_counts_from_where_it_begins() -> None:
    expected = [(step, {101: "save", 104: "leave"}.get(step)) for step in range(101, 105)]
    assert run(3, {101: "save", 104: "leave"}, start=100) == [expected] * 3


def test_a_resize_without_a_checkpoint_is_not_done_and_a_node_that_goes_is_left_all_the_same() -> None:
    assert departure("resize", 40, 30, saved=False) is None
    assert departure("save", 40, 40, saved=True) is None
    assert isinstance(departure("stop", 40, 40, saved=True), Stopped)
    for pause in ("resize", "leave"):
        saved = departure(pause, 40, 40, saved=True)
        assert isinstance(saved, Leaving) and str(saved) == "saved at step 40"
    lost = departure("leave", 40, 33, saved=False)
    assert isinstance(lost, Leaving) and "7 steps after step 33 will be done again" in str(lost)
