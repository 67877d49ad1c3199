"""slotforge: train, look at and use object-centric models."""

from pathlib import Path
from typing import Annotated

import typer

from orchestration.clusters.cli import cluster
from orchestration.command_line import Overrides, RecipeName, console, fail
from orchestration.recipe import RecipeError, load_recipe, state_home
from orchestration.shards.cli import shards

app = typer.Typer(
    help="Train object-centric models with adaptive slots: shards in, a registered model out.",
    epilog="Start with: slotforge train demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(shards, name="shards")
app.add_typer(cluster, name="cluster")


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = [],  # noqa: B006 typer reads it, nothing writes it
    fresh: Annotated[bool, typer.Option("--fresh", help="put the existing run aside and train anew")] = False,
) -> None:
    """Run a recipe: shards, training, evaluation, registry, report.

    The same command goes on from the last checkpoint after any interruption; a finished run is evaluated and shown.
    """
    from orchestration.train import main

    raise typer.Exit(main(recipe, overrides, fresh))


@app.command()
def recipe(
    recipe: RecipeName,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Check a recipe and print it with every default filled in."""
    try:
        console.print(load_recipe(recipe, overrides).yaml(), end="", highlight=False, markup=False)
    except RecipeError as error:
        fail(str(error), 2)


@app.command(epilog="For example: slotforge plan tetrominoes --step-seconds 0.05 --price-per-hour 0.4")
def plan(
    recipe: RecipeName,
    overrides: Overrides = [],  # noqa: B006
    step_seconds: Annotated[float | None, typer.Option(help="seconds of one step, measured where it will run")] = None,
    step_workers: Annotated[int | None, typer.Option(help="workers of that step; parallel.workers.min")] = None,
    measure: Annotated[bool, typer.Option(help="time a few steps on this machine's CPU, if none is given")] = True,
    price_per_hour: Annotated[float | None, typer.Option(help="of one worker's machine")] = None,
    mtbf_hours: Annotated[float, typer.Option(help="mean time between failures of one node")] = 4.0,
    disk_mb_per_second: Annotated[float, typer.Option(help="that one worker writes of a checkpoint")] = 200.0,
    as_json: Annotated[bool, typer.Option("--json", help="plain values, in bytes and seconds")] = False,
) -> None:
    """Say what a recipe will take, before any money is spent: memory, steps, checkpoints, time and cost."""
    import json

    from orchestration.planning import report as plan_report

    given = plan_report.Assumptions(step_seconds, step_workers, measure, mtbf_hours, disk_mb_per_second, price_per_hour)
    try:
        found = plan_report.plan_run(load_recipe(recipe, overrides), given)
    except RecipeError as error:
        fail(str(error), 2)
    if as_json:
        print(json.dumps(plan_report.as_json(found), indent=1))
        return
    plan_report.show(found, given, console)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="PNG or JPEG files, of any size")],
    model: Annotated[str, typer.Option(help="models:/name@champion, or models:/name/version")],
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow's URI; the default store if not given")] = None,
    out: Annotated[Path, typer.Option(help="folder for overlays and JSON")] = Path("predictions"),
) -> None:
    """Find the objects in images with a registered model."""
    from mlflow.exceptions import MlflowException

    from orchestration.predict import ImageError
    from orchestration.predict import predict as predict_images

    uri = tracking_uri or f"sqlite:///{state_home() / 'mlflow.db'}"
    try:
        for found in predict_images(images, model, uri, out):
            console.print(
                f"{found.image}: {found.objects} objects; {found.overlay}, {found.facts}", highlight=False, markup=False
            )
    except (ImageError, ValueError, MlflowException) as error:
        fail(str(error), 1)


if __name__ == "__main__":
    app()
