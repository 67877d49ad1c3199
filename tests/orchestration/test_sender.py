"""The thread that sends: nothing waits for it, nothing is lost by it."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from orchestration.tracking import sender as sending
from orchestration.tracking.sender import Sender

PATIENCE = 30.0


class FakeTracker:
    """An MLflow that is down as often as it is told to be."""

    def __init__(self) -> None:
        self.committed: list[int] = []
        self.sent: list[int] = []
        self.statuses: list[str] = []
        self.failures = 0

    def send_committed(self) -> None:
        while len(self.sent) < len(self.committed):
            if self.failures:
                self.failures -= 1
                raise MlflowException("connection refused")
            self.sent.append(self.committed[len(self.sent)])

    def status(self, status: str) -> None:
        self.statuses.append(status)


class Said(list[str]):
    def __call__(self, text: str, style: str) -> None:
        self.append(text)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(sending, "RETRY_SECONDS", (0.01, 0.02))


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def failing(*errors: Exception) -> Callable[[], Any]:
    """Connects after these errors."""
    left: Iterator[Exception] = iter(errors)

    def connect() -> Any:
        error = next(left, None)
        if error is not None:
            raise error
        return FakeTracker()

    return connect


def test_everything_is_sent_in_order_while_mlflow_comes_and_goes() -> None:
    tracker, said = FakeTracker(), Said()
    with Sender(lambda: tracker, [], said) as sender:  # type: ignore[arg-type, return-value]
        sender.status("RUNNING")
        for number in range(50):
            if number % 10 == 5:
                tracker.failures = 3
            tracker.committed.append(number)
        wait(lambda: len(tracker.sent) == 50)
        tracker.committed.append(50)
        assert sender.close("FINISHED")
    assert tracker.sent == list(range(51))
    assert tracker.statuses == ["RUNNING", "FINISHED"]


def test_an_outage_is_told_once_and_its_end_too() -> None:
    tracker, said = FakeTracker(), Said()
    with Sender(lambda: tracker, [], said) as sender:  # type: ignore[arg-type, return-value]
        tracker.failures = 20
        tracker.committed.append(1)
        wait(lambda: tracker.sent == [1])
        assert sender.close("FINISHED")
    assert len(said) == 2
    assert "connection refused" in said[0] and said[1] == "MLflow takes everything again"


def test_a_run_starts_without_an_mlflow_that_does_not_answer_and_finds_it_later() -> None:
    said = Said()
    with Sender(failing(*[MlflowException("connection refused")] * 5), [], said) as sender:
        assert "training goes on" in said[0]
        wait(lambda: sender.tracker is not None)
        assert sender.close("FINISHED")


def test_a_run_does_not_start_with_an_mlflow_that_refuses() -> None:
    refusal = MlflowException("who are you?", error_code=PERMISSION_DENIED)
    with pytest.raises(MlflowException, match="who are you"), Sender(failing(refusal), [], Said()):
        pytest.fail("it started")


def test_a_refusal_while_a_run_trains_is_an_outage() -> None:
    """A token that runs out must not cost a run."""
    outage = MlflowException("connection refused")
    refusal = MlflowException("your token is old", error_code=PERMISSION_DENIED)
    with Sender(failing(outage, refusal, refusal), [], Said()) as sender:
        wait(lambda: sender.tracker is not None)
        assert sender.close("FINISHED")


def test_an_mlflow_that_hangs_holds_up_neither_training_nor_the_end() -> None:
    hangs, said = threading.Event(), Said()

    def connect() -> Any:
        hangs.wait(PATIENCE)
        return FakeTracker()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sending, "FIRST_SECONDS", 0.05)
        sender = Sender(connect, [], said).__enter__()
    sender.status("RUNNING")  # returns at once
    assert not sender.close("KILLED", seconds=0.05)
    assert "nothing is lost" in said[-1]
    hangs.set()


def test_the_end_of_a_run_that_is_done_waits_for_an_mlflow_that_takes_what_it_is_given() -> None:
    class Slow:
        def deliver(self, tracker: Any) -> None:
            time.sleep(0.3)

    with Sender(lambda: FakeTracker(), [Slow()], Said()) as sender:  # type: ignore[arg-type, return-value]
        assert sender.close("FINISHED", seconds=0.01, patient=True)
    down = [MlflowException("connection refused")] * 100_000
    with Sender(failing(*down), [], Said()) as sender:
        assert not sender.close("FINISHED", seconds=0.1, patient=True), "but not for one that is down"


def test_other_cargo_that_fails_does_not_hold_up_the_curves() -> None:
    class Stuck:
        def deliver(self, tracker: Any) -> None:
            raise OSError("no such bucket")

    tracker, said = FakeTracker(), Said()
    with Sender(lambda: tracker, [Stuck()], said) as sender:  # type: ignore[arg-type, return-value]
        tracker.committed += [1, 2]
        wait(lambda: tracker.sent == [1, 2])
        assert not sender.close("FINISHED", seconds=0.1)
    assert "no such bucket" in said[0]


def test_a_defect_is_not_swallowed() -> None:
    class Broken:
        def deliver(self, tracker: Any) -> None:
            raise KeyError("defect")

    with (
        pytest.raises(KeyError, match="defect"),
        Sender(lambda: FakeTracker(), [Broken()], Said()) as sender,  # type: ignore[arg-type, return-value]
    ):
        sender.close("FINISHED")


def test_requests_have_short_limits_while_it_sends_unless_the_user_has_set_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timeout, retries = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    monkeypatch.delenv(timeout, raising=False)
    monkeypatch.setenv(retries, "4")
    with Sender(failing(), [], Said()) as sender:
        assert (os.environ[timeout], os.environ[retries]) == ("20", "4")
        sender.close("FINISHED")
    assert timeout not in os.environ and os.environ[retries] == "4"
