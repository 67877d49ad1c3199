"""The clock divides time without losing any."""

from hypothesis import given
from hypothesis import strategies as st

from orchestration.profiling.clock import PartClock


def test_a_part_does_not_count_the_parts_within_it() -> None:
    times = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    clock = PartClock(now=lambda: next(times))
    with clock.part("backward"), clock.part("communication"):
        pass
    assert clock.lap() == {"other": 1.0 + 16.0, "backward": 2.0 + 8.0, "communication": 4.0}


@given(st.recursive(st.just([]), lambda inner: st.lists(st.tuples(st.sampled_from("abc"), inner), max_size=4)))
def test_the_parts_add_up_to_the_time_that_passed(tree: list) -> None:
    passed = 0

    def now() -> float:
        nonlocal passed
        passed += 1
        return passed

    def walk(parts: list) -> None:
        for name, inner in parts:
            with clock.part(name):
                walk(inner)

    clock = PartClock(now=now)
    walk(tree)
    assert sum(clock.lap().values()) == passed - 1


def test_queued_work_is_settled_before_each_reading() -> None:
    """As on a GPU: a part that only queues work is charged with it."""
    time, queued = 0.0, 0.0

    def settle() -> None:
        nonlocal time, queued
        time, queued = time + queued, 0.0

    clock = PartClock(now=lambda: time, settle=settle)
    with clock.part("forward"):
        queued = 5.0
    assert clock.lap()["forward"] == 5.0


def test_an_error_ends_its_part() -> None:
    times = iter(range(10))
    clock = PartClock(now=lambda: float(next(times)))
    try:
        with clock.part("forward"):
            raise KeyError
    except KeyError:
        pass
    assert clock.lap() == {"other": 2.0, "forward": 1.0}
