"""When checkpoints are due."""

import math

import pytest

from orchestration.interval import FIRST_SECONDS, SaveInterval, mtbf_of_run
from orchestration.planning.cost import LEAST_SECONDS, MOST_SECONDS


def test_a_fixed_number_of_steps_asks_no_clock() -> None:
    interval = SaveInterval(30, mtbf=1.0, now=lambda: 0.0)
    assert [step for step in range(1, 100) if interval.due(step)] == [30, 60, 90]


def test_by_time_the_first_cost_sets_the_interval_to_young_and_dalys() -> None:
    clock = [0.0]
    interval = SaveInterval(None, mtbf=4 * 3600.0, now=lambda: clock[0])
    assert not interval.due(1)
    clock[0] = FIRST_SECONDS
    assert interval.due(2)
    interval.saved(cost=0.5)
    assert interval.seconds == pytest.approx(math.sqrt(2 * 0.5 * 4 * 3600))  # Young 1974
    clock[0] += interval.seconds - 0.1
    assert not interval.due(3)
    clock[0] += 0.1
    assert interval.due(4)


@pytest.mark.parametrize(("cost", "expected"), [(1e-6, LEAST_SECONDS), (1e4, MOST_SECONDS)])
def test_it_stays_within_reason(cost: float, expected: float) -> None:
    interval = SaveInterval(None, mtbf=4 * 3600.0, now=lambda: 0.0)
    interval.saved(cost)
    assert interval.seconds == expected


@pytest.mark.parametrize(("world", "on_a_node", "nodes"), [(1, 1, 1), (8, 8, 1), (16, 8, 2), (9, 8, 2), (5, 1, 5)])
def test_ranks_of_one_node_fail_together(world: int, on_a_node: int, nodes: int) -> None:
    assert mtbf_of_run(4.0, world, on_a_node) == 4 * 3600 / nodes
