"""A run's shards: the recipe's own folders, or scenes rendered by Ray, a shard a task."""

import hashlib
import json
import time
from pathlib import Path

from rich.progress import Progress, TaskID

from orchestration.rank import Data, training_stream
from orchestration.recipe import Recipe, RecipeError, ScenesSection, state_home
from orchestration.run_folder import Lease, LeaseHeldError, RunFolder
from pipelines import DataError, Index, Shard, read_index, write_index
from pipelines.scenes import Tetrominoes
from pipelines.scenes.render import render_shard


def data_folders(recipe: Recipe) -> Data:
    """Where a recipe's shards are, or will be; a rendered set's folder is named by what it is made from."""
    scenes = recipe.data.scenes
    if scenes is None:
        assert recipe.data.train is not None  # the recipe has either
        assert recipe.data.eval is not None
        return Data(Path(recipe.data.train).expanduser().absolute(), Path(recipe.data.eval).expanduser().absolute())
    digest = hashlib.sha256(json.dumps(scenes.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:12]
    folder = state_home() / "data" / f"tetrominoes-{digest}"
    return Data(folder / "train", folder / "eval")


def is_prepared(recipe: Recipe) -> bool:
    """Whether all shards are there; a folder with an index is complete."""
    data = data_folders(recipe)
    return all((folder / "index.json").is_file() for folder in (data.train, data.eval))


def prepare(recipe: Recipe, progress: Progress) -> None:
    """Renders what is missing. Needs a running Ray; a killed run goes on with the shards it has."""
    data, scenes = data_folders(recipe), recipe.data.scenes
    while scenes is not None and not is_prepared(recipe):
        try:
            with Lease(RunFolder(data.train.parent)):  # runs of one data set share it, and one renders
                _render_all(scenes, data, progress)
        except LeaseHeldError:
            time.sleep(1)


def _render_all(scenes: ScenesSection, data: Data, progress: Progress) -> None:
    shards = _shard_sizes(scenes.train, scenes.per_shard)
    held_out = _shard_sizes(scenes.eval, scenes.per_shard)
    bar = progress.add_task("rendering scenes", total=scenes.train + scenes.eval)
    _render(scenes, data.train, shards, 0, progress, bar)
    _render(scenes, data.eval, held_out, len(shards), progress, bar)  # other numbers: other scenes
    progress.remove_task(bar)


def check_data(recipe: Recipe) -> dict[str, str]:
    """Digests of the training and the held-out set.

    Raises:
        RecipeError: the sets share a shard, or their images do not fit the model.
        DataError: an index is missing or damaged.
    """
    data, size = data_folders(recipe), recipe.model.image_size
    train, held_out = read_index(data.train), read_index(data.eval)
    if shared := {shard.sha256 for shard in train.shards} & {shard.sha256 for shard in held_out.shards}:
        name = next(shard.name for shard in held_out.shards if shard.sha256 in shared)
        raise RecipeError(f"data.eval: its shard {name} is in data.train too; hold out shards that are not trained on")
    for field, index in (("train", train), ("eval", held_out)):
        if index.size != (size, size):
            raise RecipeError(
                f"data.{field}: images are {index.size}, not model.image_size: {size} squared; "
                "set it to their size or ingest them at this one"
            )
    try:  # made, not read from: it checks that the open windows fit into memory
        training_stream(recipe, data.train, 0, recipe.parallel.workers.min)
    except ValueError as error:
        raise RecipeError(f"data: {error}") from error
    return {"train": train.digest, "eval": held_out.digest}


def renderer(scenes: ScenesSection) -> Tetrominoes:
    return Tetrominoes(pieces=scenes.pieces, grid=scenes.grid, cell=scenes.cell)


def _render(
    scenes: ScenesSection, folder: Path, sizes: list[int], first: int, progress: Progress, bar: TaskID
) -> Index:
    import ray

    task = ray.remote(num_cpus=1)(render_shard)
    pending = {
        task.remote(folder, renderer(scenes), scenes.seed, first + number, size): (number, size)
        for number, size in enumerate(sizes)
    }
    shards: dict[int, Shard] = {}
    while pending:
        for done in ray.wait(list(pending), num_returns=1)[0]:
            number, size = pending.pop(done)
            try:
                shards[number] = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise DataError(f"data.scenes: a shard could not be rendered: {error.cause}") from error
            progress.advance(bar, size)
    about = {"scenes": scenes.model_dump(mode="json"), "set": folder.name, "masks": True}
    return write_index(folder, [shards[number] for number in range(len(sizes))], about)


def _shard_sizes(samples: int, per_shard: int) -> list[int]:
    return [min(per_shard, samples - start) for start in range(0, samples, per_shard)]
