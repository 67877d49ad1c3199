"""All ranks stop after the same step, whenever the request comes."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from orchestration.stopping import StopRequest


def run(path: Path, world: int, asked_after: int | None, steps: int = 12) -> list[list[int]]:
    """The steps that each of some ranks did, in step with each other as a gradient's reduction keeps them: rank 0 asks
    for a stop after one of its steps, while the others are anywhere in theirs."""
    barrier, end, decided = threading.Barrier(world), threading.Barrier(world), []
    done: list[list[int]] = [[] for _ in range(world)]
    clock = [0.0]

    def body(rank: int) -> None:
        def agree(decide: Any) -> Any:
            if rank == 0:
                decided.append(decide())
            barrier.wait(10)
            return decided[0]

        stop = StopRequest(path, rank, world, "127.0.0.1", agree, now=lambda: clock[0])
        for step in range(1, steps + 1):
            barrier.wait(10)  # the reduction of this step's gradient
            if rank == 0:
                clock[0] += 1
                time.sleep(0.002 * (step % 3))
                if step == asked_after:
                    path.touch()
            else:
                time.sleep(0.001 * ((step * rank) % 4))
            done[rank].append(step)
            if stop.due(step):
                break
        end.wait(10)  # rank 0 outlives the others' last question

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return done


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("asked_after", [1, 2, 6, 11])
def test_all_ranks_stop_after_the_step_that_follows_the_request(tmp_path: Path, world: int, asked_after: int) -> None:
    assert run(tmp_path / "stop", world, asked_after) == [list(range(1, asked_after + 2))] * world


@pytest.mark.parametrize("world", [1, 3])
def test_without_a_request_every_step_is_done(tmp_path: Path, world: int) -> None:
    assert run(tmp_path / "stop", world, None) == [list(range(1, 13))] * world


def test_the_file_is_looked_for_twice_a_second(tmp_path: Path) -> None:
    path, clock = tmp_path / "stop", [0.0]
    stop = StopRequest(path, 0, 1, "127.0.0.1", lambda decide: decide(), now=lambda: clock[0])
    assert not stop.due(1)
    path.touch()
    clock[0] = 0.4
    assert not stop.due(2) and not stop.due(3)
    clock[0] = 0.6
    assert not stop.due(4)
    assert stop.due(5)
