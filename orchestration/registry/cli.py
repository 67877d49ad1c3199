"""slotforge evaluate, promote, rollback, export."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from orchestration.command_line import Overrides, console, fail, say
from orchestration.recipe_files import RecipeError
from orchestration.terminal import new_progress

if TYPE_CHECKING:
    from orchestration.registry.subject import Subject

REFUSED, UNDECIDED, INTERRUPTED = 1, 2, 130

models = typer.Typer()

Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL", help="a run or its recipe; models:/name@champion or models:/name/3; or a model's folder"
    ),
]
Shards = Annotated[str | None, typer.Option(help="held-out shards; the recipe's data.eval if not given")]
TrackingUri = Annotated[
    str | None,
    typer.Option(help="MLflow's URI; by default the run's, $MLFLOW_TRACKING_URI, or one in the state folder"),
]


@models.command(epilog="For example: slotforge evaluate demo --json, or evaluate models:/slotforge-demo@champion")
def evaluate(
    model: Model,
    shards: Shards = None,
    slots: Annotated[
        str | None, typer.Option(help="numbers of slots, e.g. 5,7,11; the model's own if not given")
    ] = None,
    overrides: Overrides = [],  # noqa: B006 typer reads it, nothing writes it
    tracking_uri: TrackingUri = None,
    as_json: Annotated[bool, typer.Option("--json", help="plain values")] = False,
) -> None:
    """Tell every metric of a model on held-out images, with 95 % intervals over images.

    The same command gives the same numbers: initial slots start from a fixed noise, and ± is the deviation over three
    such. Other numbers of slots than the model was trained with show how it generalises. Of a model only weights and
    plain values are read, none of its code is run.
    """
    with _errors():
        from orchestration.registry.held_out import HeldOut
        from orchestration.registry.report import evaluated

        subject = _subject(model, overrides, tracking_uri)
        counts = [subject.recipe.model.num_slots] if slots is None else _numbers(slots)
        held_out = HeldOut.of(subject.recipe, shards)
        with new_progress(Console(stderr=True)) as progress:
            report = evaluated(subject.label, subject.trained(), held_out, counts, progress)
    if as_json:
        print(json.dumps(report.as_json(), indent=1, allow_nan=False))
    else:
        console.print(report.table())


@models.command(epilog="For example: slotforge promote demo, or promote models:/slotforge-demo/3 --check")
def promote(
    model: Model,
    shards: Shards = None,
    overrides: Overrides = [],  # noqa: B006
    tracking_uri: TrackingUri = None,
    check: Annotated[
        bool, typer.Option("--check", help="move nothing: tell whether somebody moved the aliases by hand")
    ] = False,
) -> None:
    """Make a registered model the champion, if it passes the gate of its recipe.

    It and the champion are evaluated on the same held-out images. The floors (registry.floors) have to hold, and it
    must not be worse than the champion by more than registry.tolerated_loss, with registry.confidence, by a paired
    bootstrap over images. The alias previous keeps the way back; the decision is written on the version. Exits with 1
    if the gate refuses (with --check: if the aliases are not where the last decision put them), and with 2 if nothing
    was decided.
    """
    with _errors():
        from orchestration.registry.held_out import HeldOut
        from orchestration.registry.loading import trained as trained_of
        from orchestration.registry.promote import moved_by_hand
        from orchestration.registry.record import Contender
        from orchestration.registry.register import submit

        subject = _subject(model, overrides, tracking_uri)
        if check:
            if difference := moved_by_hand(subject.client, subject.name):
                fail(f"{difference}: moved by hand, or by a promotion that was killed", REFUSED)
            say(f"{subject.name}: champion and previous are where the last decision put them")
            return
        if subject.version is None:
            fail(
                f"{subject.label}: it is not registered; slotforge train registers a run's model at its end", UNDECIDED
            )
        held_out = HeldOut.of(subject.recipe, shards)
        version = f"models:/{subject.name}/{subject.version}"
        with new_progress(Console(stderr=True)) as progress:
            trained = trained_of(version, subject.tracking)
            scores = held_out.score({"it": trained.finder()}, progress, f"evaluating version {subject.version}")["it"]
            candidate = Contender(subject.name, subject.version, trained, scores, held_out.digest)
            decision = submit(candidate, subject.recipe, subject.client, held_out, subject.tracking, progress)
    if not decision.champion:
        fail(f"{decision.name} version {decision.version} is not champion: {decision.reason}", REFUSED)
    say(f"{decision.name} version {decision.version} is champion: {decision.reason}")


@models.command(epilog="For example: slotforge rollback slotforge-demo")
def rollback(
    name: Annotated[str, typer.Argument(help="of the registered model")],
    tracking_uri: TrackingUri = None,
) -> None:
    """Make the version before the champion champion again; said twice, nothing has changed."""
    with _errors():
        from mlflow import MlflowClient

        from orchestration.registry.promote import rollback as roll_back
        from orchestration.tracking import store_uri

        uri = store_uri(tracking_uri)
        now, before = roll_back(MlflowClient(uri, registry_uri=uri), name.removeprefix("models:/"))
    say(f"{name}: version {now} is champion again, version {before} is previous")


@models.command(epilog="For example: slotforge export models:/slotforge-demo@champion --out demo.pt2")
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="the file to write")] = Path("model.pt2"),
    tracking_uri: TrackingUri = None,
) -> None:
    """Write a model as a torch.export program: torch alone runs it, without slotforge.

    torch.export.load("model.pt2").module() takes uint8 images [B, S, S, 3] of the model's size, any number at a time.
    """
    with _errors():
        from orchestration.registry.export import export as export_program

        finder = _subject(model, [], tracking_uri).trained().finder()
        export_program(finder, out)
    say(f"{out}: uint8 images [B, {finder.image_size}, {finder.image_size}, 3] -> masks, keep, slots, count")


def _subject(model: str, overrides: list[str], tracking_uri: str | None) -> "Subject":
    from orchestration.registry.subject import subject_of

    return subject_of(model, overrides, tracking_uri)


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        fail(f"--slots {text}: these are not numbers of slots; write e.g. --slots 5,7,11", UNDECIDED)
    return [int(part) for part in parts]


@contextmanager
def _errors() -> Iterator[None]:
    """What a user can mend becomes a sentence and an exit code."""
    from mlflow.exceptions import MlflowException

    from orchestration.registry.subject import SubjectError
    from orchestration.scores import NotFiniteError
    from pipelines import DataError

    try:
        yield
    except (RecipeError, SubjectError, DataError, NotFiniteError, ValueError, ImportError, MlflowException) as error:
        fail(str(error), UNDECIDED)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
