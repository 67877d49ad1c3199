"""slotforge: train, look at and use object-centric models."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from orchestration.recipe import RecipeError, load_recipe, recipe_names, state_home

app = typer.Typer(
    help="Train object-centric models with adaptive slots: shards in, a registered model out.",
    epilog="Start with: slotforge train demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
shards = typer.Typer(help="Make, bring in and check WebDataset shards.", no_args_is_help=True)
app.add_typer(shards, name="shards")
console = Console(soft_wrap=True)

RecipeName = Annotated[str, typer.Argument(help=f"a name ({', '.join(recipe_names())}) or a path to a YAML file")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="FIELD=VALUE", help="change a field, e.g. train.batch_size=256")
]


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
        _fail(str(error), 2)


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
        _fail(str(error), 1)


@shards.command()
def make(
    recipe: RecipeName,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Render the scenes of a recipe into shards; a killed run goes on where it was."""
    from orchestration.cluster import ray_cluster
    from orchestration.prepare import check_data, data_folders, prepare
    from orchestration.train import new_progress
    from pipelines import DataError

    try:
        loaded = load_recipe(recipe, overrides)
        with ray_cluster(loaded), new_progress(console) as progress:
            prepare(loaded, progress)
        check_data(loaded)
    except RecipeError as error:
        _fail(str(error), 2)
    except DataError as error:
        _fail(str(error), 1)
    data = data_folders(loaded)
    console.print(f"training shards: {data.train}\nheld-out shards: {data.eval}", highlight=False, markup=False)


@shards.command()
def ingest(
    images: Annotated[Path, typer.Argument(help="folder of PNG, JPEG or WebP files, at any depth")],
    out: Annotated[Path, typer.Argument(help="gets the folders train and eval")],
    size: Annotated[int, typer.Option(help="pixels a side that images are cut and resized to")] = 64,
    masks: Annotated[Path | None, typer.Option(help="folder of PNG masks with the images' names")] = None,
    held_out: Annotated[float, typer.Option(help="share of the images for evaluation")] = 0.05,
) -> None:
    """Turn a folder of images into training and held-out shards."""
    from pipelines import DataError
    from pipelines.ingest import ingest_folder

    try:
        result = ingest_folder(images, out, size=size, masks=masks, held_out=held_out)
    except (DataError, ValueError) as error:
        _fail(str(error), 1)
    held = result.held_out.num_samples if result.held_out else 0
    console.print(f"{result.train.num_samples} training images, {held} held out: {out}", highlight=False, markup=False)
    for name in result.unreadable:
        console.print(f"left out: {name}", style="yellow", highlight=False, markup=False)


@shards.command()
def index(folder: Annotated[Path, typer.Argument(help="folder of WebDataset tars")]) -> None:
    """Write the index of an existing folder of WebDataset tars."""
    from pipelines import DataError, index_folder

    try:
        found = index_folder(folder)
    except DataError as error:
        _fail(str(error), 1)
    console.print(
        f"{len(found.shards)} shards, {found.num_samples} samples: {folder / 'index.json'}",
        highlight=False,
        markup=False,
    )


@shards.command()
def verify(folder: Annotated[Path, typer.Argument(help="folder of shards with an index")]) -> None:
    """Check every checksum, count and member; exits with 1 and names what is wrong."""
    from pipelines import verify as find_problems

    problems = find_problems(folder)
    for problem in problems:
        Console(stderr=True, soft_wrap=True).print(problem, style="red", highlight=False, markup=False)
    if problems:
        raise typer.Exit(1)
    console.print(f"{folder}: every shard is whole", highlight=False, markup=False)


def _fail(message: str, code: int) -> NoReturn:
    from orchestration.train import complain

    complain(message)
    sys.exit(code)


if __name__ == "__main__":
    app()
