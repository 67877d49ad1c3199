"""slotforge: train, look at and use object-centric models."""

from typing import Annotated

import typer

from orchestration.clusters.cli import cluster
from orchestration.command_line import Overrides, RecipeName, console, fail
from orchestration.recipe import RecipeError, load_recipe
from orchestration.registry.cli import models
from orchestration.serving.cli import predict, serve
from orchestration.shards.cli import shards
from orchestration.submission.cli import submit

app = typer.Typer(
    help="Train object-centric models with adaptive slots: shards in, a registered model out.",
    epilog="Start with: slotforge train demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(shards, name="shards")
app.add_typer(cluster, name="cluster")
app.add_typer(models)
app.command(epilog="For example: slotforge submit demo --address http://localhost:8265 --retries 3")(submit)
app.command(epilog="For example: slotforge predict photo.jpg --model models:/slotforge-demo@champion")(predict)
app.command(epilog="For example: slotforge serve --model models:/slotforge-demo@champion --port 8000")(serve)


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
    disk_mb_per_second: Annotated[float, typer.Option(help="that one worker writes of a checkpoint")] = 200.0,
    as_json: Annotated[bool, typer.Option("--json", help="plain values, in bytes and seconds")] = False,
) -> None:
    """Say what a recipe will take, before any money is spent: memory, steps, checkpoints, time and cost."""
    import json

    from orchestration.planning import report as plan_report

    given = plan_report.Assumptions(step_seconds, step_workers, measure, disk_mb_per_second, price_per_hour)
    try:
        found = plan_report.plan_run(load_recipe(recipe, overrides), given)
    except RecipeError as error:
        fail(str(error), 2)
    if as_json:
        print(json.dumps(plan_report.as_json(found), indent=1))
        return
    plan_report.show(found, given, console)


if __name__ == "__main__":
    app()
