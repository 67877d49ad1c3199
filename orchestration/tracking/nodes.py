"""What a run asks of its machines, on its page: a child run for each node and attempt."""

from collections import deque

from mlflow.entities import Metric

from orchestration.node_metrics import Sample
from orchestration.tracking.tracker import MOST_POINTS, Tracker

WAITING = 10_000  # samples of a node, kept while MLflow does not take them; older ones go


class Nodes:
    """Sends samples. A sample sent twice is one: its time is part of it."""

    def __init__(self) -> None:
        self._arrived: deque[tuple[str, str, list[Sample]]] = deque()  # by another thread
        self._waiting: dict[tuple[str, str], list[Sample]] = {}
        self._runs: dict[tuple[str, str], str] = {}

    def add(self, node: str, attempt: str, samples: list[Sample]) -> None:
        """Samples of a node; an attempt is a start of the workers."""
        self._arrived.append((node, attempt, samples))

    def deliver(self, tracker: Tracker) -> None:
        while self._arrived:
            node, attempt, samples = self._arrived.popleft()
            waiting = self._waiting.setdefault((node, attempt), [])
            waiting += samples
            del waiting[:-WAITING]
        for (node, attempt), waiting in self._waiting.items():
            while waiting:
                metrics = [Metric(*sample) for sample in waiting[:MOST_POINTS]]
                run = self._run(tracker, node, attempt)
                tracker.client.log_batch(run, metrics=metrics)
                # nobody tells when the node goes: its run is over with what is known of it
                tracker.client.set_terminated(run, "FINISHED", max(metric.timestamp for metric in metrics))
                del waiting[: len(metrics)]

    def _run(self, tracker: Tracker, node: str, attempt: str) -> str:
        if (node, attempt) not in self._runs:
            self._runs[node, attempt] = tracker.child(f"{node} {attempt}", node=node, attempt=attempt)
        return self._runs[node, attempt]
