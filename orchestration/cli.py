"""slotforge: train, look at and use object-centric models."""

from pathlib import Path
from typing import Annotated

import typer

from orchestration.clusters.cli import cluster
from orchestration.command_line import Overrides, RecipeName, console, fail
from orchestration.planning.cli import plan
from orchestration.recipe_files import RecipeError
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


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = [],  # noqa: B006 typer reads it, nothing writes it
    fresh: Annotated[bool, typer.Option("--fresh", help="put the existing run aside and train anew")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="tell at the end where a step's time went")] = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="the same, and a trace of a few steps for Perfetto")
    ] = None,
) -> None:
    """Run a recipe: shards, training, evaluation, registry, report.

    The same command goes on from the last checkpoint after any interruption; a finished run is evaluated and shown.
    """
    from orchestration.train import main

    raise typer.Exit(main(recipe, overrides, fresh, profile, trace))


@app.command()
def recipe(
    recipe: RecipeName,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Check a recipe and print it with every default filled in."""
    from orchestration.recipe import load_recipe

    try:
        console.print(load_recipe(recipe, overrides).yaml(), end="", highlight=False, markup=False)
    except RecipeError as error:
        fail(str(error), 2)


app.command(epilog="For example: slotforge submit demo --address http://localhost:8265 --retries 3")(submit)
app.command(epilog="For example: slotforge plan tetrominoes --step-seconds 0.05 --price-per-hour 0.4")(plan)
app.command(epilog="For example: slotforge predict photo.jpg --model models:/slotforge-demo@champion")(predict)
app.command(epilog="For example: slotforge serve --model models:/slotforge-demo@champion --port 8000")(serve)
app.add_typer(models)
app.add_typer(shards, name="shards")
app.add_typer(cluster, name="cluster")

if __name__ == "__main__":
    app()
