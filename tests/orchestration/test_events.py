"""A run's events, kept by its folder through drivers that die."""

import json
from pathlib import Path

from orchestration.events import Event, EventLog
from orchestration.runs.storage import LocalStorage


def test_events_are_kept_through_drivers(tmp_path: Path) -> None:
    folder = LocalStorage(tmp_path)
    first = EventLog(folder)
    assert first.text() == "" and set(first.counts().values()) == {0}
    first.add(Event(0.0, "start", "from step 0"))
    first.add(Event(1.5, "failure", "rank 1 failed", 30), Event(2.0, "resize", "room for 4 workers", 40))
    later = EventLog(folder)
    later.add(Event(86400.0, "restart", "saved at step 41", 41))
    assert later.text() == (tmp_path / "events.jsonl").read_text()
    lines = [json.loads(line) for line in later.text().splitlines()]
    assert lines[0] == {"time": "1970-01-01T00:00:00Z", "step": 0, "kind": "start", "text": "from step 0"}
    assert [(line["time"][:10], line["kind"], line["step"]) for line in lines[1:]] == [
        ("1970-01-01", "failure", 30),
        ("1970-01-01", "resize", 40),
        ("1970-01-02", "restart", 41),
    ]
    assert later.counts() == {
        "drivers": 1,
        "restarts": 2,
        "failures": 1,
        "resizes": 1,
        "preemptions": 0,
        "warnings": 0,
    }
