"""slotforge submit"""

import os
import signal
from collections.abc import Mapping
from typing import Annotated

import typer

from orchestration.command_line import Overrides, RecipeName, console, fail
from orchestration.recipe_files import RecipeError

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that Ray's own commands take the dashboard's address from."""


def submit(
    recipe: RecipeName,
    overrides: Overrides = [],  # noqa: B006 typer reads it, nothing writes it
    address: Annotated[
        str | None,
        typer.Option(help="the head's dashboard, e.g. http://localhost:8265; $RAY_ADDRESS or the local cluster's"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="put the existing run aside and train anew")] = False,
    retries: Annotated[int, typer.Option(min=0, help="times to submit again when the job fails or is lost")] = 0,
    stop_seconds: Annotated[
        int | None, typer.Option(help="that a job asked to stop has to save before it is killed; 90")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="show the job's log until its end")] = True,
) -> None:
    """Train a recipe on a cluster: pack it with the project, submit it, follow its log.

    Exits as the job does: 0 done, 1 failed, 2 wrong recipe, 3 another driver writes the run, 130 stopped. Ctrl-C asks
    the job to stop, which saves first; a second one leaves it to itself. The same submission goes on from the last
    checkpoint. A token is taken as Ray's own commands do: from RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
    """
    where, variables = (address, {}) if address else found_address(os.environ)
    os.environ.update(variables)  # before Ray is imported, which reads them then
    if where is None:
        fail(
            "--address: no cluster is named or up here; write the head's dashboard, e.g. http://localhost:8265, or "
            "start a cluster on this machine: slotforge cluster up --local 2",
            1,
        )
    from orchestration.submission import submit as submission
    from orchestration.submission.job import LEAST_STOP_SECONDS
    from orchestration.submission.package import PackageError
    from orchestration.train import INTERRUPTED

    least = LEAST_STOP_SECONDS
    if stop_seconds is not None and stop_seconds < least:
        fail(f"--stop-seconds: {stop_seconds} is less than the {least} that saving may take; give that or more", 2)
    if retries and not follow:
        fail(f"--retries: {retries} needs the job to be followed to its end; leave --no-follow out", 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    try:
        code = submission.submit(
            recipe,
            overrides,
            address=where,
            fresh=fresh,
            retries=retries,
            stop_seconds=stop_seconds or least,
            follow=follow,
            console=console,
        )
    except RecipeError as error:
        fail(str(error), submission.WRONG_RECIPE)
    except (PackageError, submission.SubmissionError) as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted before a job was submitted", INTERRUPTED)
    raise typer.Exit(code)


def found_address(environ: Mapping[str, str]) -> tuple[str | None, dict[str, str]]:
    """Where no address is given: that of Ray's variables, or of the local cluster; with variables for its token."""
    from orchestration.clusters.local import running

    for name in ADDRESSES:
        if environ.get(name):
            return environ[name], {}
    local = running()
    return (None, {}) if local is None else (local.address, local.environment())
