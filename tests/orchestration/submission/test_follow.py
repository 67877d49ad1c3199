"""A job's log is shown once, whatever happens to the connection; its end is its own, and Ctrl-C asks it to stop."""

from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_cluster import HANG, Clock, Cluster, Info
from ray.job_submission import JobStatus

from orchestration.submission import follow
from orchestration.submission.follow import PATIENCE_SECONDS, End, Follower, Outcome, wait_before


def followed(cluster: Cluster, clock: Clock, show: Callable[[str], None]) -> Outcome:
    told: list[str] = []
    return Follower(cluster, "job-1", show, told.append, sleep=clock.sleep, now=clock.now).follow()


DONE = Info(JobStatus.SUCCEEDED, 0)
BROKEN = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


@given(
    log=st.text(min_size=1, max_size=80),
    breaks=st.lists(st.tuples(st.integers(0, 80), st.sampled_from([BROKEN, None, OSError("reset")])), max_size=5),
)
def test_a_log_is_shown_once_wherever_the_connection_breaks(log: str, breaks: list[tuple[int, object]]) -> None:
    shown: list[str] = []
    cluster = Cluster(log, [(min(upto, len(log)), how) for upto, how in breaks], DONE)
    assert followed(cluster, Clock(), shown.append) == Outcome(End.SUCCEEDED, 0)
    assert "".join(shown) == log


def test_a_connection_that_falls_silent_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "QUIET_SECONDS", 0.05)
    cluster = Cluster("all of the log", [(5, HANG)], DONE)
    shown: list[str] = []
    assert followed(cluster, Clock(), shown.append).end is End.SUCCEEDED
    assert "".join(shown) == "all of the log"


def test_a_cluster_that_is_silent_for_long_is_left() -> None:
    cluster, clock = Cluster("", [], DONE), Clock()
    cluster.unreachable = True
    outcome = followed(cluster, clock, lambda text: None)
    assert outcome.end is End.UNREACHABLE and "nobody there" in outcome.message
    assert PATIENCE_SECONDS < clock.time < PATIENCE_SECONDS + 60
    assert clock.slept == [wait_before(tries) for tries in range(len(clock.slept))]
    assert sorted(clock.slept) == clock.slept and clock.slept[:4] == [1, 2, 4, 8]


def test_patience_counts_from_the_last_word_and_not_from_the_start_of_the_log() -> None:
    """A laptop that has followed a log for hours and loses its network for a minute has not lost the job."""
    clock, shown = Clock(), []

    class Slow(Cluster):
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            async for text in super().tail_job_logs(job_id):
                clock.time += 10 * PATIENCE_SECONDS
                yield text

    cluster = Slow("0123456789", [(7, BROKEN)], DONE)

    def show(text: str) -> None:
        shown.append(text)
        cluster.unreachable = len(shown) == 1

    sleep = clock.sleep

    def slept(seconds: float) -> None:
        sleep(seconds)
        cluster.unreachable = cluster.unreachable and len(clock.slept) < 5

    told: list[str] = []
    outcome = Follower(cluster, "job-1", show, told.append, sleep=slept, now=clock.now).follow()
    assert (outcome.end, "".join(shown)) == (End.SUCCEEDED, "0123456789")
    assert len(told) == 1 and "trying again" in told[0]


def test_a_log_that_is_silent_while_the_cluster_answers_is_word_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "QUIET_SECONDS", 0.02)
    cluster, clock = Cluster("all", [(3, HANG)], DONE), Clock()
    running, asked = Info(JobStatus.RUNNING), 0

    def info(job_id: str) -> Info:
        nonlocal asked
        asked += 1
        if asked in (4, 5):
            raise ConnectionError("nobody there")  # for a moment, after a long silence
        if asked < 4:
            clock.time += PATIENCE_SECONDS / 2
        return running if asked < 7 else DONE

    cluster.get_job_info = info  # type: ignore[method-assign]
    cluster.breaks += [(3, None)]
    assert followed(cluster, clock, lambda text: None).end is End.SUCCEEDED


def test_a_job_that_the_cluster_forgot_is_lost() -> None:
    cluster = Cluster("some", [(2, BROKEN)], DONE)
    cluster.get_job_info = lambda job_id: (_ for _ in ()).throw(  # type: ignore[method-assign]
        RuntimeError("Request failed with status code 404: Job job-1 does not exist.")
    )
    assert followed(cluster, Clock(), lambda text: None).end is End.LOST


def test_the_fate_is_told_though_the_end_of_the_log_is_gone() -> None:
    """The node of a driver dies with its log; the head still knows how the job ended."""
    cluster = Cluster("", [], Info(JobStatus.FAILED, None, "its node died"))
    cluster.breaks = []

    async def nothing(job_id: str) -> AsyncIterator[str]:
        raise BROKEN
        yield ""

    cluster.tail_job_logs = nothing  # type: ignore[method-assign]
    assert followed(cluster, Clock(), lambda text: None) == Outcome(End.FAILED, None, "its node died")


def test_ctrl_c_asks_the_job_to_stop_and_a_second_one_leaves() -> None:
    cluster, shown = Cluster("0123456789", [(4, None)], DONE), []

    def press(times: int) -> Callable[[str], None]:
        def show(text: str) -> None:
            shown.append(text)
            if len(shown) <= times:
                raise KeyboardInterrupt

        return show

    assert followed(cluster, Clock(), press(1)).end is End.STOPPED
    assert cluster.stops == 1 and "".join(shown) == "0123456789"

    cluster, shown = Cluster("0123456789", [(4, None)], DONE), []
    assert followed(cluster, Clock(), press(2)).end is End.LEFT
    assert cluster.stops == 1
