"""slotforge: train, look at and use object-centric models."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from orchestration.cluster_cli import cluster
from orchestration.recipe import RecipeError, load_recipe, recipe_names, state_home
from pipelines.ingest.formats import FORMATS
from pipelines.scenes import RENDERERS

if TYPE_CHECKING:
    from orchestration.shard_work import Spread

app = typer.Typer(
    help="Train object-centric models with adaptive slots: shards in, a registered model out.",
    epilog="Start with: slotforge train demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
shards = typer.Typer(
    help="Make, bring in, check and look at WebDataset shards: the folders that data.train and data.eval name.",
    epilog="Start with: slotforge shards make tetrominoes shards --count 2000; slotforge shards preview shards/train",
    no_args_is_help=True,
)
app.add_typer(shards, name="shards")
app.add_typer(cluster, name="cluster")
console = Console(soft_wrap=True)
_MOST_READERS = 4
"""Of a file that is read from its beginning: each reader unpacks all of it."""

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

    from orchestration import plan_report

    given = plan_report.Assumptions(step_seconds, step_workers, measure, mtbf_hours, disk_mb_per_second, price_per_hour)
    try:
        found = plan_report.plan_run(load_recipe(recipe, overrides), given)
    except RecipeError as error:
        _fail(str(error), 2)
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
        _fail(str(error), 1)


OutFolder = Annotated[Path, typer.Argument(help="gets the folders train and eval")]
PerShard = Annotated[int, typer.Option(min=1, help="samples in a shard")]
Local = Annotated[bool, typer.Option("--local", help="work in this process alone, without Ray")]


@shards.command(epilog="For example: slotforge shards make tetrominoes shards --count 60000 --eval 320")
def make(
    scenes: Annotated[str | None, typer.Argument(metavar="[SET]", help=f"one of {', '.join(RENDERERS)}")] = None,
    out: Annotated[Path | None, typer.Argument(help="gets the folders train and eval")] = None,
    count: Annotated[int, typer.Option(min=1, help="training scenes")] = 60_000,
    held_out: Annotated[int, typer.Option("--eval", min=0, help="held-out scenes")] = 320,
    seed: Annotated[int, typer.Option(min=0, help="other seeds, other scenes")] = 0,
    per_shard: PerShard = 1000,
    overrides: Overrides = [],  # noqa: B006
    recipe: Annotated[str | None, typer.Option(help="render the scenes of a recipe instead, where it looks")] = None,
    local: Local = False,
) -> None:
    """Render scenes with masks and factors into shards.

    --set changes a field of what is rendered (or, with --recipe, of the recipe): --set "pieces=[2, 4]". The same words
    give the same bytes. A killed run leaves whole shards; saying the same again makes what is missing.
    """
    from orchestration.train import new_progress

    if recipe is not None:
        if scenes is not None or out is not None:
            _fail("give a SET and a folder, or --recipe, not both", 2)
        _make_for(recipe, overrides)
        return
    if scenes is None or out is None:
        _fail("give a SET and a folder: slotforge shards make tetrominoes shards --count 60000", 2)
    from orchestration.shard_work import make_set, scene_fields, scene_set

    clock = time.perf_counter()
    try:
        renderer = scene_set(scenes, scene_fields(overrides))
        renderer.render(0, 0, 1)  # or a value is found out by a worker
        with _data_errors(), _spread(local) as (spread, _), new_progress(console) as progress:
            made = make_set(renderer, scenes, out, (count, held_out), per_shard, seed, spread, progress)
    except ValueError as error:  # scenes that cannot be rendered
        _fail(str(error), 2)
    _say(f"{_rate(sum(index.num_samples for index in made), clock)}: {out}")


@shards.command(
    epilog="For example: slotforge shards ingest PHOTOS shards --size 64; slotforge shards ingest "
    "clevr_with_masks_train.tfrecords shards --format clevr-with-masks --crop clevr --size 128"
)
def ingest(
    source: Annotated[Path, typer.Argument(help="a folder, a file, or how the names of TFRecord files begin")],
    out: OutFolder,
    format: Annotated[str, typer.Option(help=f"one of {', '.join(FORMATS)}")] = "images",
    size: Annotated[int | None, typer.Option(min=1, help="pixels a side; as they are if not given")] = None,
    crop: Annotated[
        str | None,
        typer.Option(help="centre (a square, as is usual with --size), clevr (rows 29:221, columns 64:256), or none"),
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="images: folder of PNG masks with the images' names")] = None,
    images: Annotated[Path | None, typer.Option(help="coco: folder of the images")] = None,
    held_out: Annotated[float, typer.Option(help="share of the records for evaluation")] = 0.05,
    only: Annotated[str | None, typer.Option(help="train or eval: put everything there")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="take the first records only")] = None,
    per_shard: PerShard = 1000,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad records out, count and name them")] = False,
    local: Local = False,
) -> None:
    """Turn images, with or without masks, into training and held-out shards.

    Images become PNG, or stay the JPEG that they are if nothing is cut or resized; masks become PNG label maps with 0
    for the background. What cannot be read stops the work with its file and record named, unless --skip-bad is given.
    A killed run leaves whole shards; saying the same again makes what is missing.
    """
    from orchestration.shard_work import ingest_source
    from orchestration.train import new_progress
    from pipelines.ingest import Framing, Ingest, open_source

    clock = time.perf_counter()
    with _data_errors():
        try:
            read = open_source(format, source, images=images, masks=masks)
            job = Ingest(read, Framing(size, crop), per_shard, held_out, only, limit, skip_bad)
        except ValueError as error:
            _fail(str(error), 2)
        with _spread(local) as (spread, workers), new_progress(console) as progress:
            result = ingest_source(job, out, spread, progress, workers)
    for line in result.left_out:
        console.print(f"left out: {line}", style="yellow", highlight=False, markup=False)
    train, held = (index.num_samples if index else 0 for index in (result.train, result.held_out))
    rate = _rate(train + held, clock)
    _say(f"{rate}, {train} training images, {held} held out, {len(result.left_out)} records left out: {out}")


@shards.command(epilog="For example: slotforge shards index my-shards; slotforge shards verify my-shards")
def index(
    folder: Annotated[Path, typer.Argument(help="folder of WebDataset tars")],
    local: Local = False,
) -> None:
    """Write the index of an existing folder of WebDataset tars.

    The tars stay as they are: index.json and a small file of offsets for each shard are put beside them.
    """
    from orchestration.shard_work import index_set
    from orchestration.train import new_progress

    clock = time.perf_counter()
    with _data_errors(), _spread(local) as (spread, _), new_progress(console) as progress:
        found = index_set(folder, spread, progress)
    masks = "with masks" if found.about.get("masks") else "without masks for all"
    _say(f"{_rate(found.num_samples, clock)}, {len(found.shards)} shards, {masks}: {folder / 'index.json'}")


@shards.command(epilog="For example: slotforge shards verify shards/train || echo damaged")
def verify(
    folder: Annotated[Path, typer.Argument(help="folder of shards with an index")],
    local: Local = False,
) -> None:
    """Check every checksum, count and member; exits with 1 and names what is wrong.

    Every image and mask is decoded, and their sizes compared with each other and with the index.
    """
    from orchestration.shard_work import verify_set
    from orchestration.train import new_progress
    from pipelines import read_index

    found, clock = 0, time.perf_counter()
    with _data_errors():
        known = read_index(folder)
        with _spread(local) as (spread, _), new_progress(console) as progress:
            for problem in verify_set(folder, known, spread, progress):
                found += 1
                Console(stderr=True, soft_wrap=True).print(problem, style="red", highlight=False, markup=False)
    if found:
        _fail(f"{folder}: {found} problems", 1)
    _say(f"{_rate(known.num_samples, clock)}, {folder}: every shard is whole")


@shards.command(epilog="For example: slotforge shards preview shards/train --out preview.png")
def preview(
    folder: Annotated[Path, typer.Argument(help="folder of shards with an index")],
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("preview.png"),
    samples: Annotated[int, typer.Option(min=1, help="how many to show, spread over the set")] = 24,
    columns: Annotated[int, typer.Option(min=1, help="samples side by side")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="other seeds show other samples")] = 0,
) -> None:
    """Write a picture of some samples, each beside itself with its masks laid over in colours."""
    from pipelines.preview import contact_sheet

    with _data_errors():
        sheet = contact_sheet(folder, samples, seed, columns)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(out, format="PNG")
        except OSError as error:
            _fail(f"--out {out}: cannot be written ({error}); name another file", 1)
    _say(f"{samples} samples of {folder}: {out}")


def _make_for(recipe: str, overrides: list[str]) -> None:
    """Render the scenes of a recipe."""
    from orchestration.cluster import ray_cluster
    from orchestration.prepare import check_data, data_folders, prepare
    from orchestration.train import new_progress

    try:
        loaded = load_recipe(recipe, overrides)
        with _data_errors():
            with ray_cluster(loaded.parallel.workers.max), new_progress(console) as progress:
                prepare(loaded, progress)
            check_data(loaded)
    except RecipeError as error:
        _fail(str(error), 2)
    data = data_folders(loaded)
    _say(f"training shards: {data.train}\nheld-out shards: {data.eval}")


@contextmanager
def _spread(local: bool) -> Iterator[tuple["Spread", int]]:
    """(what spreads work, over how many workers): Ray's, or this process alone."""
    from orchestration.shard_work import in_process, over_ray

    if local:
        yield in_process, 1
        return
    from orchestration.cluster import ray_cluster

    with ray_cluster(workers=2):  # at least
        import ray

        yield over_ray, min(_MOST_READERS, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]


@contextmanager
def _data_errors() -> Iterator[None]:
    """Damaged data ends a command in a sentence, not in a stack."""
    from pipelines import DataError

    try:
        yield
    except DataError as error:
        _fail(str(error), 1)


def _rate(samples: int, since: float) -> str:
    seconds = time.perf_counter() - since
    return f"{samples} samples in {seconds:.0f} s ({samples / seconds:.0f}/s)"


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False)


def _fail(message: str, code: int) -> NoReturn:
    from orchestration.train import complain

    complain(message)
    sys.exit(code)


if __name__ == "__main__":
    app()
