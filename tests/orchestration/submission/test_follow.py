"""A job's log is shown once, whatever happens to the connection; its end is its own, and Ctrl-C asks it to stop."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.job_submission import JobStatus
from rich.console import Console

from orchestration.recipe import RecipeError
from orchestration.submission import follow
from orchestration.submission.follow import PATIENCE_SECONDS, End, Follower, Outcome, wait_before
from orchestration.submission.job import Job, environment
from orchestration.submission.log import LogView
from orchestration.submission.submit import (
    SubmissionError,
    exit_code,
    mendable,
    run_to_the_end,
    use_token,
    wait_before_retry,
)
from orchestration.terminal import new_progress, progress_line, read_progress

HANG = object()  # a connection that says nothing any more


@dataclass
class Info:
    status: JobStatus
    driver_exit_code: int | None = None
    message: str | None = None


@dataclass
class Clock:
    """Time that passes only where it is slept."""

    time: float = 0.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds

    def now(self) -> float:
        return self.time


class Cluster:
    """Ray's client, of a job whose log is known: each connection gives some of it, from its beginning, and breaks."""

    def __init__(self, log: str, breaks: list[tuple[int, object]], end: Info) -> None:
        self.log, self.breaks, self.end = log, breaks, end
        self.stops = 0
        self.unreachable = False
        self.submitted: list[str] = []

    def get_job_info(self, job_id: str) -> Any:
        if self.unreachable:
            raise ConnectionError("nobody there")
        return Info(JobStatus.RUNNING) if self.breaks else self.end

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        if self.unreachable:
            raise ConnectionError("nobody there")
        upto, how = self.breaks.pop(0) if self.breaks else (len(self.log), None)
        for start in range(0, upto, 7):
            yield self.log[start : min(start + 7, upto)]
        if isinstance(how, Exception):
            raise how
        if how is HANG:
            await asyncio.sleep(3600)

    def stop_job(self, job_id: str) -> bool:
        self.stops += 1
        self.end = Info(JobStatus.STOPPED)
        return True

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> str:
        self.submitted.append(entrypoint)
        return submission_id


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


JOB = Job("demo", "package.zip", "recipes/demo.yaml", ("train.steps=5",), {})


class Retried(Cluster):
    """Jobs that end in turn."""

    def __init__(self, *ends: tuple[str, Info]) -> None:
        super().__init__("", [], ends[0][1])
        self._ends = list(ends)

    def submit_job(self, **arguments: Any) -> str:
        self.log, self.end = self._ends.pop(0)
        return super().submit_job(**arguments)


def failed(code: int | None) -> Info:
    return Info(JobStatus.FAILED, code, f"Job entrypoint command failed with exit code {code}")


def run(cluster: Cluster, retries: int, fresh: bool = False) -> tuple[int, str, Clock]:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=200)
    code = run_to_the_end(cluster, JOB, fresh=fresh, retries=retries, console=console, sleep=clock.sleep, now=clock.now)
    return code, out.getvalue(), clock


@pytest.mark.parametrize(
    ("ends", "retries", "code", "submissions"),
    [
        ([DONE], 3, 0, 1),
        ([failed(1), failed(-9), DONE], 3, 0, 3),  # the driver failed, was killed, ended well
        ([failed(1), failed(1)], 1, 1, 2),
        ([failed(1)], 0, 1, 1),
        ([failed(2)], 3, 2, 1),  # a wrong recipe stays wrong
        ([failed(3)], 3, 3, 1),  # another driver writes the run
        ([Info(JobStatus.STOPPED)], 3, 130, 1),  # somebody meant it
        ([failed(None), failed(2)], 3, 2, 2),
    ],
)
def test_a_job_is_submitted_again_where_that_can_mend_it(
    ends: list[Info], retries: int, code: int, submissions: int
) -> None:
    cluster = Retried(*(("", end) for end in ends))
    assert run(cluster, retries)[0] == code
    assert len(cluster.submitted) == submissions


def test_a_second_submission_goes_on_with_the_run_that_the_first_began() -> None:
    """--fresh puts a run aside once, when the driver has begun; never what the retried job has trained."""
    cluster = Retried(("no module\n", failed(1)), ("run demo: starting Ray\n", failed(1)), ("", DONE))
    assert run(cluster, 3, fresh=True)[0] == 0
    assert [command.endswith(" --fresh") for command in cluster.submitted] == [True, True, False]


def test_a_dead_drivers_lease_is_waited_for() -> None:
    from orchestration.runs.lease import LEASE_SECONDS

    assert wait_before_retry(Outcome(End.FAILED, 1)) < LEASE_SECONDS
    for died in (Outcome(End.FAILED, -9), Outcome(End.FAILED, 137), Outcome(End.FAILED), Outcome(End.LOST)):
        assert wait_before_retry(died) > LEASE_SECONDS
        assert mendable(died) and exit_code(died) == 1


def test_a_head_that_is_still_starting_is_waited_for_and_another_error_is_told() -> None:
    cluster, tries = Retried(("", DONE)), []
    submit = cluster.submit_job

    def later(**arguments: Any) -> str:
        tries.append(1)
        if len(tries) < 4:
            raise RuntimeError("Request failed with status code 500: No available agent to submit job")
        return submit(**arguments)

    cluster.submit_job = later  # type: ignore[method-assign]
    assert run(cluster, 0)[0] == 0 and len(tries) == 4

    def refused(**arguments: Any) -> str:
        raise RuntimeError("Request failed with status code 400: bad runtime_env")

    cluster.submit_job = refused  # type: ignore[method-assign]
    with pytest.raises(SubmissionError, match="bad runtime_env"):
        run(cluster, 0)


def test_a_job_is_named_after_its_run_and_its_command_survives_a_shell() -> None:
    import shlex

    override = "parallel.workers={min: 1, max: 4}"
    job = Job("clevr.6", "p.zip", "recipes/my clevr.yaml", (override, "name=a'b"), {})
    assert job.new_id().startswith("clevr.6-") and job.new_id() != job.new_id()
    words = shlex.split(job.command(fresh=True))
    assert words[:3] == ["python", "-m", "orchestration.train"]
    assert words[3:] == ["--recipe", "recipes/my clevr.yaml", "--set", override, "--set", "name=a'b", "--fresh"]


def test_a_job_gets_what_the_user_has_set_and_no_secret() -> None:
    from orchestration.mailbox import STOP_SECONDS
    from orchestration.submission.job import LEAST_STOP_SECONDS

    assert LEAST_STOP_SECONDS > STOP_SECONDS
    given = {"SLOTFORGE_HOME": "/shared", "MLFLOW_TRACKING_PASSWORD": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    passed = environment(given, 90, 120)
    assert passed == {"SLOTFORGE_HOME": "/shared", "RAY_JOB_STOP_WAIT_TIME_S": "90", "COLUMNS": "120"}
    with pytest.raises(RecipeError, match="SLOTFORGE_RUNS") as caught:
        environment({"SLOTFORGE_RUNS": "s3://me:hunter2@bucket"}, 90, 120)
    assert "hunter2" not in str(caught.value)


def test_ray_is_told_of_a_token_that_is_there(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    environ: dict[str, str] = {}
    use_token(environ)
    assert environ == {}
    environ = {"RAY_AUTH_TOKEN_PATH": "/token"}
    use_token(environ)
    assert environ["RAY_AUTH_MODE"] == "token"
    environ = {"RAY_AUTH_TOKEN": "t", "RAY_AUTH_MODE": "disabled"}
    use_token(environ)
    assert environ["RAY_AUTH_MODE"] == "disabled"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    environ = {}
    use_token(environ)
    assert environ == {"RAY_AUTH_MODE": "token"}


@given(st.integers(0, 10**9), st.one_of(st.none(), st.integers(1, 10**9)), st.text("abc 0.4[]/", min_size=1))
def test_a_line_of_progress_is_read_as_it_was_meant(done: int, total: int | None, text: str) -> None:
    assert read_progress(progress_line(done, total, text)) == (done, total, text)
    assert read_progress(f"rank-0: {progress_line(done, total, text)}") is None


def test_a_log_file_gets_lines_where_a_terminal_has_a_bar() -> None:
    out = io.StringIO()
    with new_progress(Console(file=out, width=100)) as progress:
        bar = progress.add_task("rendering", total=3)
        progress.update(bar, completed=2)
    assert "[2/3] rendering" in out.getvalue().splitlines()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_becomes_a_bar_again_and_other_lines_stay(terminal: bool) -> None:
    out = io.StringIO()
    with new_progress(Console(file=out, width=100, force_terminal=terminal)) as progress:
        view = LogView(progress)
        for piece in ("run demo: sta", "rting [Ray]\n[5/1", "0] training  loss 0.5\nlast words"):
            view.feed(piece)
        view.close()
        assert [(task.completed, task.total) for task in progress.tasks] == ([(5, 10)] if terminal else [])
    assert "run demo: starting [Ray]" in out.getvalue() and "last words" in out.getvalue()
    assert ("[5/10] training" in out.getvalue()) is not terminal
