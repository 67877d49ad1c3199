"""One promotion at a time, on a real sqlite store. tests/system/test_promotions.py kills and freezes processes."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest

from orchestration.registry.lock import PromotionError, PromotionLock

QUEUE = "shared.promotions"


def tickets(client: mlflow.MlflowClient) -> list[int]:
    return sorted(int(ticket.version) for ticket in client.search_model_versions(f"name = '{QUEUE}'"))


def test_holders_follow_each_other_in_the_order_of_their_tickets(client: mlflow.MlflowClient) -> None:
    def turn(_: int) -> tuple[int, float, float]:
        with PromotionLock(client, "shared") as lock:
            began = time.monotonic()
            time.sleep(0.05)
            lock.check()
            return lock.ticket, began, time.monotonic()

    with ThreadPoolExecutor(6) as pool:
        turns = sorted(pool.map(turn, range(6)))
    assert all(ended <= began for (_, _, ended), (_, began, _) in itertools.pairwise(turns))
    assert len({ticket for ticket, _, _ in turns}) == 6
    assert tickets(client) == []


def test_a_dead_holder_is_evicted_by_the_next_in_line_alone(client: mlflow.MlflowClient) -> None:
    """Two wait behind a ticket that nobody holds; who comes second waits for the first, not for its own patience."""
    dead = client.create_model_version(QUEUE, "slotforge:/ticket", await_creation_for=0)
    began, order = time.monotonic(), []

    def turn(seconds: float) -> None:
        with PromotionLock(client, "shared", seconds) as lock:
            order.append((lock.ticket, time.monotonic() - began))

    first = threading.Thread(target=turn, args=(2.0,))
    first.start()
    while len(tickets(client)) < 2:
        time.sleep(0.01)
    turn(60.0)
    first.join()
    assert [ticket for ticket, _ in order] == [int(dead.version) + 1, int(dead.version) + 2]
    assert 2.0 <= order[0][1] <= order[1][1] < 60.0


def test_a_holder_that_takes_too_long_stops_itself(client: mlflow.MlflowClient) -> None:
    with PromotionLock(client, "shared", seconds=0.4) as lock:
        time.sleep(0.3)
        with pytest.raises(PromotionError, match="nothing was moved"):
            lock.check()


def test_a_removed_ticket_is_noticed(client: mlflow.MlflowClient) -> None:
    with PromotionLock(client, "shared") as lock:
        client.delete_model_version(QUEUE, str(lock.ticket))
        with pytest.raises(PromotionError):
            lock.check()


def test_who_gives_up_waiting_leaves_no_ticket(client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with PromotionLock(client, "shared") as lock:
        monkeypatch.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt), PromotionLock(client, "shared"):
            pass
        assert tickets(client) == [lock.ticket]
