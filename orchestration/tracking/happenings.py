"""A run's events on their way to MLflow: the whole log as an artifact, and counters as tags."""

from orchestration.events import FILE, EventLog
from orchestration.tracking.tracker import Tracker


class Happenings:
    """Sends the log when it has grown."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._sent = 0

    def deliver(self, tracker: Tracker) -> None:
        number = len(self._log.lines)
        if number == self._sent:
            return
        tracker.client.log_text(tracker.run_id, self._log.text(), FILE)
        tracker.tag(**{name: str(count) for name, count in self._log.counts().items()})
        self._sent = number
