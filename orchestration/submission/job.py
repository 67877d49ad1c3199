"""A job as Ray takes it: its name, its command, its environment."""

import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from orchestration.mailbox import SEND_SECONDS, STOP_SECONDS
from orchestration.recipe import Recipe, RecipeError
from pipelines.sources import local_path

LEAST_STOP_SECONDS = int(STOP_SECONDS + SEND_SECONDS) + 15
"""That a job needs from the request to stop to its end: for its ranks to save, and for what the driver does then."""
PASSED_ON = ("SLOTFORGE_HOME", "SLOTFORGE_RUNS")
"""Variables that a job gets where the user has set them; any other is set where Ray is started."""


@dataclass(frozen=True)
class Job:
    """What is submitted.

    Fields:
        run: the run's name.
        package: the archive of the project.
        recipe: where the recipe is in it.
        overrides: field=value.
        environment: of the job and its ranks; anybody who sees the job sees it.
    """

    run: str
    package: str
    recipe: str
    overrides: tuple[str, ...]
    environment: Mapping[str, str]

    def new_id(self) -> str:
        """A name for one submission: the run's, and six letters that no other has."""
        return f"{self.run}-{secrets.token_hex(3)}"

    def command(self, fresh: bool) -> str:
        """For the shell that Ray starts it with."""
        words = ["python", "-m", "orchestration.train", "--recipe", self.recipe]
        words += [word for override in self.overrides for word in ("--set", override)]
        return shlex.join([*words, *(["--fresh"] if fresh else [])])

    def runtime_env(self) -> dict[str, object]:
        return {"working_dir": self.package, "env_vars": dict(self.environment)}


def environment(given: Mapping[str, str], stop_seconds: int, width: int) -> dict[str, str]:
    """Variables of a job.

    Args:
        given: the user's.
        stop_seconds: from the request to stop until Ray kills.
        width: of the terminal that will show the log.

    Raises:
        RecipeError: a variable holds a password, which everybody who sees the job would see.
    """
    passed = {name: given[name] for name in PASSED_ON if given.get(name)}
    for name, value in passed.items():
        if "://" in value and urlsplit(value).password:
            raise RecipeError(
                f"{name}: it holds a password, which Ray shows to everybody who sees the job; set credentials where "
                "Ray is started, e.g. as AWS_* variables"
            )
    return {**passed, "RAY_JOB_STOP_WAIT_TIME_S": str(stop_seconds), "COLUMNS": str(width)}


def check_places(recipe: Recipe) -> None:
    """Shards are not packed, so an address of them must be right on the cluster's nodes too.

    Raises:
        RecipeError: it is relative to the folder here.
    """
    for field, sets in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for entry in sets or ():
            path = local_path(entry.url)
            if path is not None and not path.expanduser().is_absolute():
                raise RecipeError(
                    f"data.{field}: {entry.url!r} is relative to a folder here, and shards do not travel with a job; "
                    "write the path that all nodes of the cluster see, or an address such as s3://..."
                )
