"""slotforge submit: a recipe to a cluster, its log back, its fate as an exit code."""

import logging
import os
import tempfile
import time
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from orchestration.recipe import load_recipe
from orchestration.recipe_files import find_recipe
from orchestration.runs.lease import LEASE_SECONDS
from orchestration.submission.follow import End, Follower, Jobs, Outcome
from orchestration.submission.job import PASSED_ON, Job, check_places, environment
from orchestration.submission.log import LogView
from orchestration.submission.package import pack
from orchestration.terminal import new_progress
from orchestration.train import INTERRUPTED
from orchestration.wording import counted

START_SECONDS = 60.0
"""In which a head that has just told its address gets ready for jobs."""
RETRY_SECONDS = 10.0
WRONG_RECIPE, ALREADY_WRITTEN = 2, 3


class SubmissionError(Exception):
    """The cluster does not take the job; the message says why."""


class Client(Jobs, Protocol):
    """The part of ray.job_submission.JobSubmissionClient that is used."""

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> str: ...


def submit(
    recipe: str,
    overrides: Sequence[str],
    *,
    address: str,
    fresh: bool,
    retries: int,
    stop_seconds: int,
    follow: bool,
    console: Console,
) -> int:
    """Submits a recipe and follows it.

    Returns:
        The exit code of orchestration.train, as far as the job came to one; 130 if it was stopped or left.

    Raises:
        RecipeError: the recipe is wrong, or cannot be sent.
        PackageError: the project is too large to be sent.
        SubmissionError: the cluster does not take the job.
    """
    loaded = load_recipe(recipe, overrides)
    check_places(loaded)
    variables = environment(os.environ, stop_seconds, console.width)
    client = connect(address)
    with tempfile.TemporaryDirectory(prefix="slotforge-") as folder:
        package = pack(find_recipe(recipe), Path(folder))
        job = Job(loaded.name, str(package.path), package.recipe, tuple(overrides), variables)
        passed = ", ".join(f"{name}={variables[name]}" for name in PASSED_ON if name in variables)
        console.print(
            f"run [bold]{loaded.name}[/]: {package.bytes / 1e6:.1f} MB to {address}"
            + (f", with {passed} from your environment" if passed else ""),
            highlight=False,
        )
        if not follow:
            job_id = send(client, job, fresh)
            console.print(f"job {job_id}; follow it with: ray job logs --address {address} --follow {job_id}")
            return 0
        return run_to_the_end(client, job, fresh=fresh, retries=retries, console=console)


def run_to_the_end(
    client: Client,
    job: Job,
    *,
    fresh: bool,
    retries: int,
    console: Console,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Submits a job, again where that can mend its end; returns the exit code."""
    while True:
        job_id = send(client, job, fresh, sleep=sleep, now=now)
        console.print(f"job {job_id}", highlight=False)
        outcome, begun = _follow(client, job_id, job.run, console, sleep, now)
        fresh = fresh and not begun  # once the driver has put the old run aside, the next one goes on from it
        code = exit_code(outcome)
        if code == 0:
            return 0
        said = _told(outcome, job_id, code)
        if not (mendable(outcome) and retries > 0):
            console.print(said, style="red", highlight=False, markup=False)
            return code
        wait = wait_before_retry(outcome)
        retries -= 1
        console.print(
            f"{said}; once more in {wait:.0f} s, {counted(retries, 'time')} left after it", style="yellow", markup=False
        )
        try:
            sleep(wait)
        except KeyboardInterrupt:
            return INTERRUPTED


def _follow(
    client: Client,
    job_id: str,
    run: str,
    console: Console,
    sleep: Callable[[float], None],
    now: Callable[[], float],
) -> tuple[Outcome, bool]:
    """A job's fate, and whether its driver has begun with the run: its log says so."""
    begun, last = False, ""

    with new_progress(console) as progress:
        view = LogView(progress)

        def show(text: str) -> None:
            nonlocal begun, last
            begun = begun or f"run {run}:" in last + text
            last = (last + text)[-len(f"run {run}:") :]
            view.feed(text)

        outcome = Follower(client, job_id, show, view.tell, sleep=sleep, now=now).follow()
        view.close()
    return outcome, begun


def exit_code(outcome: Outcome) -> int:
    """Of the driver where it came to one, and what is nearest to it where not."""
    if outcome.end in (End.STOPPED, End.LEFT):
        return INTERRUPTED
    if outcome.end is End.SUCCEEDED:
        return 0
    known = (WRONG_RECIPE, ALREADY_WRITTEN, INTERRUPTED)
    return outcome.exit_code if outcome.exit_code in known else 1


def mendable(outcome: Outcome) -> bool:
    """Whether the same job, submitted again, may end otherwise."""
    if outcome.end is End.LOST:
        return True
    return outcome.end is End.FAILED and outcome.exit_code not in (WRONG_RECIPE, ALREADY_WRITTEN)


def wait_before_retry(outcome: Outcome) -> float:
    """Seconds; the lease of a driver that died without returning it is good for a while."""
    orderly = outcome.exit_code is not None and 0 < outcome.exit_code < 128
    return RETRY_SECONDS if orderly else RETRY_SECONDS + LEASE_SECONDS


def send(
    client: Client,
    job: Job,
    fresh: bool,
    *,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> str:
    """Submits; a head takes jobs a few seconds after it has told its address.

    All tries are of one job: an answer that is lost on its way does not start a second driver.

    Raises:
        SubmissionError: the cluster does not take it.
    """
    deadline, job_id, tries = now() + START_SECONDS, job.new_id(), 0
    while True:
        tries += 1
        try:
            return client.submit_job(entrypoint=job.command(fresh), submission_id=job_id, runtime_env=job.runtime_env())
        except Exception as error:  # Ray's client raises RuntimeError, its own errors and those of requests
            if tries > 1 and f"{job_id} already exists" in str(error):
                return job_id
            if now() > deadline or not _passes(error):
                raise SubmissionError(f"the cluster does not take the job: {_one_line(error)}") from error
        sleep(1)


def connect(address: str) -> Client:
    """A client of a cluster's dashboard.

    Raises:
        SubmissionError: nobody answers there, or wants another token.
    """
    use_token(os.environ)
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # they tell of each upload and connection
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    try:
        client: Client = JobSubmissionClient(address if "://" in address else f"http://{address}")
    except AuthenticationError as error:
        raise SubmissionError(
            f"--address: {address} wants another token; put that of the cluster into a file and name it: "
            "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE"
        ) from error
    except (ConnectionError, requests.exceptions.RequestException, RuntimeError, ValueError) as error:
        raise SubmissionError(
            f"--address: no Ray dashboard answers at {address} ({_one_line(error)}); write that of the head, e.g. "
            "http://127.0.0.1:8265, or start a cluster here: slotforge cluster up --local 2"
        ) from error
    return client


def use_token(environ: MutableMapping[str, str]) -> None:
    """Ray sends its token where RAY_AUTH_MODE says so as it is imported: it does if there is a token."""
    there = environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH")
    if there or (Path.home() / ".ray" / "auth_token").is_file():
        environ.setdefault("RAY_AUTH_MODE", "token")


def _passes(error: Exception) -> bool:
    """Whether an error is of a head that is still starting, or of the network."""
    import requests

    return "No available agent" in str(error) or isinstance(
        error, ConnectionError | requests.exceptions.RequestException
    )


def _told(outcome: Outcome, job_id: str, code: int) -> str:
    last = _one_line(outcome.message.partition("last available logs")[0]).rstrip(" ,")
    match outcome.end:
        case End.STOPPED:
            return f"job {job_id} was stopped; the same submission goes on from its last checkpoint"
        case End.LEFT:
            return f"job {job_id} is left to itself; ray job status {job_id} tells of it"
        case End.LOST:
            return f"job {job_id} is lost: the cluster does not know it any more, its head was started anew"
        case End.UNREACHABLE:
            return f"job {job_id}: nobody answers any more ({last}); it may still run: ray job logs --follow {job_id}"
    return f"job {job_id} failed with exit code {outcome.exit_code if outcome.exit_code is not None else code} ({last})"


def _one_line(said: object) -> str:
    return " ".join(str(said).split())
