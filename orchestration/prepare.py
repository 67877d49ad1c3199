"""A run's shards: the recipe's own folders, or scenes rendered by Ray, a shard a task."""

import hashlib
import json
import time
from pathlib import Path

from rich.progress import Progress, TaskID

from orchestration.assembly import Data, sources_of, training_stream
from orchestration.data_section import ScenesSection, SetSection
from orchestration.recipe import Recipe, RecipeError, state_home
from orchestration.runs.folder import RunFolder
from orchestration.runs.lease import Lease, LeaseHeldError
from orchestration.shards.work import over_ray, rendered, scene_set, shard_sizes
from pipelines import DataError, Index, WeightedSet, read_index
from pipelines.scenes import Renderer
from pipelines.sets import Place, Sets, place_of
from pipelines.sources import local_path


def data_folders(recipe: Recipe) -> Data:
    """Where a recipe's shards are, or will be; a rendered set's folder is named by what it is made from."""
    scenes = recipe.data.scenes
    if scenes is None:
        assert recipe.data.train is not None  # the recipe has either
        assert recipe.data.eval is not None
        return Data(_place(recipe.data.train), _place(recipe.data.eval))
    digest = hashlib.sha256(json.dumps(scenes.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:12]
    folder = state_home() / "data" / f"{scenes.kind}-{digest}"
    return Data(folder / "train", folder / "eval")


def is_prepared(recipe: Recipe) -> bool:
    """Whether all shards are there; a folder with an index is complete."""
    data = data_folders(recipe)
    return all((place / "index.json").is_file() for place in (data.train, data.eval) if isinstance(place, Path))


def prepare(recipe: Recipe, progress: Progress) -> None:
    """Renders what is missing. Needs a running Ray; a killed run goes on with the shards it has."""
    data, scenes = data_folders(recipe), recipe.data.scenes
    while scenes is not None and not is_prepared(recipe):
        try:
            with Lease(RunFolder(_folder(data.train).parent)):  # runs of one data set share it, and one renders
                _render_all(scenes, data, progress)
        except LeaseHeldError:
            time.sleep(1)


def _render_all(scenes: ScenesSection, data: Data, progress: Progress) -> None:
    shards = shard_sizes(scenes.train, scenes.per_shard)
    held_out = shard_sizes(scenes.eval, scenes.per_shard)
    bar = progress.add_task("rendering scenes", total=scenes.train + scenes.eval)
    _render(scenes, _folder(data.train), shards, 0, progress, bar)
    _render(scenes, _folder(data.eval), held_out, len(shards), progress, bar)  # other numbers: other scenes
    progress.remove_task(bar)


def check_data(recipe: Recipe) -> dict[str, str]:
    """Digests of the training and the held-out set.

    Raises:
        RecipeError: the sets share a shard, or their images do not fit the model.
        DataError: an index is missing or damaged.
    """
    data, size = data_folders(recipe), recipe.model.image_size
    sources = sources_of(recipe)
    train, held_out = read_index(data.train, sources), read_index(data.eval, sources)
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
        training_stream(recipe, data.train, {}, 0, recipe.parallel.workers.min)
    except ValueError as error:
        raise RecipeError(f"data: {error}") from error
    weights = [entry.weight for entry in data.train] if isinstance(data.train, Sets) else []
    mixed = hashlib.sha256(f"{train.digest} {weights}".encode()).hexdigest()  # the weights are part of the order
    return {"train": mixed if len(weights) > 1 else train.digest, "eval": held_out.digest}


def _place(sets: tuple[SetSection, ...]) -> Place:
    """Where sets lie, whatever folder a worker runs in."""
    places = [entry.url for entry in sets]
    for i, url in enumerate(places):
        if (path := local_path(url)) is not None:
            places[i] = str(path.expanduser().absolute())
    if len(places) > 1:
        return Sets(WeightedSet(url, entry.weight) for url, entry in zip(places, sets, strict=True))
    return place_of(places[0])


def _folder(place: Place) -> Path:
    assert isinstance(place, Path)  # what is rendered is rendered into a folder
    return place


def renderer(scenes: ScenesSection) -> Renderer:
    """What renders a recipe's scenes."""
    fields = scenes.model_dump(exclude={*ScenesSection.model_fields})
    return scene_set(scenes.kind, fields)


def _render(
    scenes: ScenesSection, folder: Path, sizes: list[int], first: int, progress: Progress, bar: TaskID
) -> Index:
    about = {"scenes": scenes.model_dump(mode="json"), "set": folder.name, "masks": True}
    drawn = renderer(scenes)
    shards = [(drawn, scenes.seed, first + number, size) for number, size in enumerate(sizes)]
    try:
        return rendered(folder, shards, about, over_ray, progress, bar)
    except ValueError as error:
        raise DataError(f"data.scenes: a shard could not be rendered: {error}") from error
