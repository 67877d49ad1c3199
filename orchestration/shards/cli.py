"""slotforge shards ..."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from orchestration.command_line import Overrides, console, fail, say
from orchestration.recipe_files import RecipeError
from orchestration.terminal import new_progress
from orchestration.wording import counted

if TYPE_CHECKING:
    from orchestration.shards.work import Spread

shards = typer.Typer(
    help="Make, bring in, check and look at WebDataset shards: the folders that data.train and data.eval name.",
    epilog="Start with: slotforge shards make tetrominoes shards --count 2000; slotforge shards preview shards/train",
    no_args_is_help=True,
)
_MOST_READERS = 4
"""Of a file that is read from its beginning: each reader unpacks all of it."""

# Named here too, beside the mappings that they are keys of: those import NumPy and much more, for a page of help.
_SETS = "tetrominoes, multi-dsprites, clevr"
_FORMATS = (
    "images, coco, hdf5, movi, webdataset, tetrominoes, multi-dsprites-binarized, multi-dsprites-on-grayscale, "
    "multi-dsprites-on-colored, objects-room, clevr-with-masks"
)

OutFolder = Annotated[Path, typer.Argument(help="gets the folders train and eval")]
PerShard = Annotated[int, typer.Option(min=1, help="samples in a shard")]
Local = Annotated[bool, typer.Option("--local", help="work in this process alone, without Ray")]


@shards.command(epilog="For example: slotforge shards make tetrominoes shards --count 60000 --eval 320")
def make(
    scenes: Annotated[str | None, typer.Argument(metavar="[SET]", help=f"one of {_SETS}")] = None,
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

    if recipe is not None:
        if scenes is not None or out is not None:
            fail("give a SET and a folder, or --recipe, not both", 2)
        _make_for(recipe, overrides)
        return
    if scenes is None or out is None:
        fail("give a SET and a folder: slotforge shards make tetrominoes shards --count 60000", 2)
    from orchestration.shards.work import make_set, scene_fields, scene_set

    clock = time.perf_counter()
    try:
        renderer = scene_set(scenes, scene_fields(overrides))
        renderer.render(0, 0, 1)  # or a value is found out by a worker
        with _data_errors(), _spread(local) as (spread, _), new_progress(console) as progress:
            made = make_set(renderer, scenes, out, (count, held_out), per_shard, seed, spread, progress)
    except ValueError as error:  # scenes that cannot be rendered
        fail(str(error), 2)
    say(f"{_rate(sum(index.num_samples for index in made), clock)}: {out}")


@shards.command(
    epilog="For example: slotforge shards ingest PHOTOS shards --size 64; slotforge shards ingest "
    "clevr_with_masks_train.tfrecords shards --format clevr-with-masks --crop clevr --size 128"
)
def ingest(
    source: Annotated[Path, typer.Argument(help="a folder, a file, or how the names of TFRecord files begin")],
    out: OutFolder,
    format: Annotated[str, typer.Option(help=f"one of {_FORMATS}")] = "images",
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
    from orchestration.shards.work import ingest_source
    from pipelines.ingest import Framing, Ingest, open_source

    clock = time.perf_counter()
    with _data_errors():
        try:
            read = open_source(format, source, images=images, masks=masks)
            job = Ingest(read, Framing(size, crop), per_shard, held_out, only, limit, skip_bad)
        except ValueError as error:
            fail(str(error), 2)
        with _spread(local) as (spread, workers), new_progress(console) as progress:
            result = ingest_source(job, out, spread, progress, workers)
    for line in result.left_out:
        console.print(f"left out: {line}", style="yellow", highlight=False, markup=False)
    train, held = (index.num_samples if index else 0 for index in (result.train, result.held_out))
    rate = _rate(train + held, clock)
    left_out = counted(len(result.left_out), "record")
    say(f"{rate}, {counted(train, 'training image')}, {held} held out, {left_out} left out: {out}")


@shards.command(epilog="For example: slotforge shards index my-shards; slotforge shards verify my-shards")
def index(
    folder: Annotated[Path, typer.Argument(help="folder of WebDataset tars")],
    local: Local = False,
) -> None:
    """Write the index of an existing folder of WebDataset tars.

    The tars stay as they are: index.json and a small file of offsets for each shard are put beside them.
    """
    from orchestration.shards.work import index_set

    clock = time.perf_counter()
    with _data_errors(), _spread(local) as (spread, _), new_progress(console) as progress:
        found = index_set(folder, spread, progress)
    masks = "with masks" if found.about.get("masks") else "without masks for all"
    say(f"{_rate(found.num_samples, clock)}, {counted(len(found.shards), 'shard')}, {masks}: {folder / 'index.json'}")


@shards.command(epilog="For example: slotforge shards verify shards/train || echo damaged")
def verify(
    folder: Annotated[Path, typer.Argument(help="folder of shards with an index")],
    local: Local = False,
) -> None:
    """Check every checksum, count and member; exits with 1 and names what is wrong.

    Every image and mask is decoded, and their sizes compared with each other and with the index.
    """
    from orchestration.shards.work import verify_set
    from pipelines import read_index

    found, clock = 0, time.perf_counter()
    with _data_errors():
        known = read_index(folder)
        with _spread(local) as (spread, _), new_progress(console) as progress:
            for problem in verify_set(folder, known, spread, progress):
                found += 1
                Console(stderr=True, soft_wrap=True).print(problem, style="red", highlight=False, markup=False)
    if found:
        fail(f"{folder}: {counted(found, 'problem')}", 1)
    say(f"{_rate(known.num_samples, clock)}, {folder}: every shard is whole")


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
            fail(f"--out {out}: cannot be written ({error}); name another file", 1)
    say(f"{counted(samples, 'sample')} of {folder}: {out}")


def _make_for(recipe: str, overrides: list[str]) -> None:
    """Render the scenes of a recipe."""
    from orchestration.clusters.connection import NoRayError, ray_cluster
    from orchestration.prepare import check_data, data_folders, prepare
    from orchestration.recipe import load_recipe

    try:
        loaded = load_recipe(recipe, overrides)
        with _data_errors():
            with ray_cluster(loaded.parallel.workers.max), new_progress(console) as progress:
                prepare(loaded, progress)
            check_data(loaded)
    except RecipeError as error:
        fail(str(error), 2)
    except NoRayError as error:
        fail(str(error), 1)
    data = data_folders(loaded)
    say(f"training shards: {data.train}\nheld-out shards: {data.eval}")


@contextmanager
def _spread(local: bool) -> Iterator[tuple["Spread", int]]:
    """(what spreads work, over how many workers): Ray's, or this process alone."""
    from orchestration.shards.work import in_process, over_ray

    if local:
        yield in_process, 1
        return
    from orchestration.clusters.capacity import cluster_capacity
    from orchestration.clusters.connection import NoRayError, ray_cluster

    with ExitStack() as stack:
        with console.status("starting Ray"):
            try:
                stack.enter_context(ray_cluster(workers=2))  # at least
            except NoRayError as error:
                fail(f"{error}; --local does without", 1)
        yield over_ray, max(1, min(_MOST_READERS, int(cluster_capacity().cpus)))


@contextmanager
def _data_errors() -> Iterator[None]:
    """Damaged data ends a command in a sentence, not in a stack."""
    from pipelines import DataError

    try:
        yield
    except DataError as error:
        fail(str(error), 1)


def _rate(samples: int, since: float) -> str:
    seconds = time.perf_counter() - since
    return f"{counted(samples, 'sample')} in {seconds:.0f} s ({samples / seconds:.0f}/s)"
