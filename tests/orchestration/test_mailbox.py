"""The mailbox, without the actor around it; and what a restart's moments add up to."""

import pytest

from orchestration.events import Event
from orchestration.mailbox import RESIZE_SECONDS, Failure, Mailbox
from orchestration.recovery import recovery_line, recovery_parts

LIVE = {"when": 100.0, "step": 7, "loss": 0.5, "kept": 3.0, "images_per_second": 10.0}


def test_news_are_told_once() -> None:
    box = Mailbox()
    box.say(1, "hello")
    box.happened(1.0, "workers", "training on 2 workers")
    assert box.show(LIVE) is None
    box.happened(2.0, "warning", "all slots are kept")
    box.glimpse(7, b"picture")
    news = box.news()
    assert (news.lines, news.glimpses, news.live) == ([(1, "hello")], [(7, b"picture")], LIVE)
    assert news.events == [
        Event(1.0, "workers", "training on 2 workers", 0),
        Event(2.0, "warning", "all slots are kept", 7),
    ]
    again = box.news()
    assert (again.lines, again.events, again.glimpses, again.live) == ([], [], [], LIVE)


def test_a_stop_outlives_a_restart_and_a_resize_does_not() -> None:
    box = Mailbox()
    box.ask("leave")
    assert box.show(LIVE) == "leave"
    box.starting()
    assert box.show(LIVE) is None
    box.ask("leave")
    box.ask("stop")
    box.ask("leave")
    box.starting()
    assert box.show(LIVE) == "stop"
    assert not box.news().stopped
    box.stopped()
    assert box.news().stopped


def test_a_resize_that_cannot_be_saved_is_tried_again_later_and_a_node_that_goes_is_left_at_once() -> None:
    clock = [100.0]
    box = Mailbox(now=lambda: clock[0])
    for when in (1.0, 2.0):  # the controller says it at each of its looks
        box.resize(when, "room for 3 workers")
    assert box.show(LIVE) == "resize"
    assert [event.when for event in box.news().events] == [1.0]
    box.stay()
    box.resize(3.0, "room for 3 workers")
    assert box.request() is None and not box.news().events
    clock[0] += RESIZE_SECONDS
    box.resize(4.0, "room for 3 workers")
    assert box.request() == "resize"
    box.ask("leave")
    box.stay()  # of the resize: the node goes all the same
    assert box.request() == "leave"
    box.starting()
    assert box.request() is None


def test_the_first_failure_counts() -> None:
    box = Mailbox()
    box.fail(Failure("DivergedError", "first"))
    box.fail(Failure("DataError", "second"))
    assert box.news().failure == Failure("DivergedError", "first")
    assert box.news().failure is not None


def test_micro_batches_are_halved_until_one_is_left() -> None:
    box = Mailbox()
    limits = []
    size = 12
    while (limit := (box.attempt(size), box.out_of_memory())[1]) is not None:
        limits.append(limit)
        size = limit
    assert limits == [6, 3, 1]
    assert Mailbox(3).micro_batch() == 3  # what an earlier driver found


def test_the_parts_of_a_restart_add_up_to_the_whole() -> None:
    box = Mailbox()
    box.show(LIVE)
    moments = {"detected": 100.5, "down": 101.0, "scheduled": 103.0, "imported": 107.0, "grouped": 107.2, "loaded": 109}
    for name, when in moments.items():
        box.mark(name, when)
    box.mark("detected", 102.0)  # a try that failed as well
    parts = recovery_parts({**box.marks(), "first step": 109.5})
    total = parts.pop("total")
    assert total == pytest.approx(9.5) == sum(parts.values())
    assert list(parts) == ["detection", "teardown", "scheduling", "imports", "process_group", "load", "first_step"]
    line = recovery_line({**parts, "total": total})
    assert line.startswith("back after 9.5 s: detection 0.5, teardown 0.5, scheduling 2.0, imports 4.0")
    assert box.marks() == {}, "the next restart begins anew"


def test_a_first_start_is_no_restart_and_clocks_that_differ_take_no_time() -> None:
    assert "total" not in recovery_parts({"scheduled": 1.0, "imported": 3.0, "loaded": 4.0, "first step": 5.0})
    parts = recovery_parts({"last step": 10.0, "detected": 9.0, "down": 11.0, "first step": 12.0})
    assert parts == {"detection": 0.0, "teardown": 1.0, "first_step": 1.0, "total": 2.0}
