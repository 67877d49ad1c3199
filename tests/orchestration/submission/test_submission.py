"""A job is submitted again where that can mend its end, with nothing secret in it; its fate is the exit code."""

import io
import shlex
from pathlib import Path
from typing import Any

import pytest
from made_up_cluster import Clock, Cluster, Info
from ray.job_submission import JobStatus
from rich.console import Console

from orchestration.mailbox import SEND_SECONDS, STOP_SECONDS
from orchestration.recipe import RecipeError
from orchestration.runs.lease import LEASE_SECONDS
from orchestration.submission.follow import End, Outcome
from orchestration.submission.job import LEAST_STOP_SECONDS, Job, environment
from orchestration.submission.submit import (
    SubmissionError,
    exit_code,
    mendable,
    run_to_the_end,
    use_token,
    wait_before_retry,
)

DONE = Info(JobStatus.SUCCEEDED, 0)
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


def test_a_submission_whose_answer_is_lost_is_one_job() -> None:
    """Ray refuses an id that it knows; the words are those of its job manager."""
    cluster, ids = Cluster("", [], DONE), []

    def submit(*, submission_id: str, **arguments: Any) -> str:
        if submission_id in ids:
            raise RuntimeError(
                "Request failed with status code 400: ValueError: Job with submission_id "
                f"{submission_id} already exists. Please use a different submission_id."
            )
        ids.append(submission_id)
        raise ConnectionError("Connection aborted.")

    cluster.submit_job = submit  # type: ignore[method-assign]
    assert run(cluster, 0)[0] == 0
    assert len(ids) == 1


def test_a_job_is_named_after_its_run_and_its_command_survives_a_shell() -> None:
    override = "parallel.workers={min: 1, max: 4}"
    job = Job("clevr.6", "p.zip", "recipes/my clevr.yaml", (override, "name=a'b"), {})
    assert job.new_id().startswith("clevr.6-") and job.new_id() != job.new_id()
    words = shlex.split(job.command(fresh=True))
    assert words[:3] == ["python", "-m", "orchestration.train"]
    assert words[3:] == ["--recipe", "recipes/my clevr.yaml", "--set", override, "--set", "name=a'b", "--fresh"]


def test_a_job_gets_what_the_user_has_set_and_no_secret() -> None:
    assert LEAST_STOP_SECONDS > STOP_SECONDS + SEND_SECONDS
    given = {"SLOTFORGE_HOME": "/shared", "MLFLOW_TRACKING_PASSWORD": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    passed = environment(given, 90, 120)
    assert passed == {"SLOTFORGE_HOME": "/shared", "RAY_JOB_STOP_WAIT_TIME_S": "90", "COLUMNS": "120"}
    with pytest.raises(RecipeError, match="SLOTFORGE_RUNS") as caught:
        environment({"SLOTFORGE_RUNS": "s3://me:hunter2@bucket"}, 90, 120)
    assert "hunter2" not in str(caught.value)


def test_ray_is_told_of_a_token_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
