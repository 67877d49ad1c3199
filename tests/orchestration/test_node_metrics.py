"""What a run asks of its machines, and how it comes to MLflow."""

import threading
from typing import Any

import psutil
import pytest

from orchestration.node_metrics import NodeMetrics, Sample, node_sample
from orchestration.tracking.nodes import WAITING, Nodes


def test_a_thread_looks_now_and_then_until_it_is_over() -> None:
    told: list[list[Sample]] = []
    thrice, clock = threading.Event(), iter(range(1, 10_000))

    def tell(samples: list[Sample]) -> None:
        told.append(samples)
        if len(told) == 3:
            thrice.set()

    with NodeMetrics(lambda: {"system/a": 1.5}, tell, seconds=0.01, now=lambda: float(next(clock))):
        assert thrice.wait(30)
    ended = len(told)
    assert told[:3] == [[("system/a", 1.5, 1000 * number, number)] for number in (1, 2, 3)]
    assert len(told) == ended


def test_a_look_at_this_machine_tells_what_the_system_tells() -> None:
    sample = node_sample()
    total = psutil.virtual_memory().total / 1e6
    assert 0 < sample["system/system_memory_usage_megabytes"] < total
    assert 0 <= sample["system/cpu_utilization_percentage"] <= 100
    assert sample["system/disk_available_megabytes"] == pytest.approx(psutil.disk_usage("/").free / 1e6, rel=0.1)


class FakeTracker:
    def __init__(self) -> None:
        self.client, self.fails = self, 0
        self.runs: dict[str, list[Sample]] = {}
        self.ends: dict[str, int] = {}

    def child(self, name: str, **tags: str) -> str:
        self.runs.setdefault(name, [])
        return name

    def log_batch(self, run: str, metrics: list[Any]) -> None:
        assert len(metrics) <= 1000
        if self.fails:
            self.fails -= 1
            raise OSError("away")
        self.runs[run] += [(m.key, m.value, m.timestamp, m.step) for m in metrics]

    def set_terminated(self, run: str, status: str, end: int) -> None:
        self.ends[run] = end


def samples(first: int, last: int) -> list[Sample]:
    return [("system/a", float(number), 1000 * number, number) for number in range(first, last)]


def test_each_node_and_attempt_has_a_run_of_its_own_that_ends_with_its_last_sample() -> None:
    nodes, tracker = Nodes(), FakeTracker()
    nodes.add("10.0.0.1", "aa", samples(1, 3))
    nodes.add("10.0.0.2", "aa", samples(1, 2))
    nodes.deliver(tracker)  # type: ignore[arg-type]
    nodes.add("10.0.0.1", "aa", samples(3, 5))
    nodes.add("10.0.0.1", "bb", samples(1, 2500))
    tracker.fails = 1
    with pytest.raises(OSError, match="away"):
        nodes.deliver(tracker)  # type: ignore[arg-type]
    nodes.deliver(tracker)  # type: ignore[arg-type]
    nodes.deliver(tracker)  # type: ignore[arg-type]
    assert tracker.runs == {
        "10.0.0.1 aa": samples(1, 5),
        "10.0.0.2 aa": samples(1, 2),
        "10.0.0.1 bb": samples(1, 2500),
    }
    assert tracker.ends == {"10.0.0.1 aa": 4000, "10.0.0.2 aa": 1000, "10.0.0.1 bb": 2499_000}


def test_while_mlflow_is_away_samples_do_not_fill_the_memory() -> None:
    nodes, tracker = Nodes(), FakeTracker()
    nodes.add("node", "aa", samples(1, WAITING + 100))
    nodes.deliver(tracker)  # type: ignore[arg-type]
    assert tracker.runs["node aa"] == samples(100, WAITING + 100), "the newest"
