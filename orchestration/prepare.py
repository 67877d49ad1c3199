"""A run's shards: the recipe's own folders, or scenes rendered by Ray, a shard a task; and other work on shards."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.progress import Progress, TaskID

from orchestration.rank import Data, sources_of, training_stream
from orchestration.recipe import Recipe, RecipeError, ScenesSection, SetSection, state_home
from orchestration.run_folder import Lease, LeaseHeldError, RunFolder
from pipelines import DataError, Index, Shard, WeightedSet, read_index, write_index
from pipelines.ingest import Ingest, Ingested, Piece, Written
from pipelines.ingest.job import SETS
from pipelines.scenes import RENDERERS, Renderer, Tetrominoes
from pipelines.scenes.render import render_shard
from pipelines.sets import Place, Sets, place_of
from pipelines.shards import INDEXED, expected_kinds, index_shard, tar_names, unlisted, verify_shard
from pipelines.sources import local_path


def data_folders(recipe: Recipe) -> Data:
    """Where a recipe's shards are, or will be; a rendered set's folder is named by what it is made from."""
    scenes = recipe.data.scenes
    if scenes is None:
        assert recipe.data.train is not None  # the recipe has either
        assert recipe.data.eval is not None
        return Data(_place(recipe.data.train), _place(recipe.data.eval))
    digest = hashlib.sha256(json.dumps(scenes.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:12]
    folder = state_home() / "data" / f"tetrominoes-{digest}"
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
    shards = _shard_sizes(scenes.train, scenes.per_shard)
    held_out = _shard_sizes(scenes.eval, scenes.per_shard)
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


def renderer(scenes: ScenesSection) -> Tetrominoes:
    return Tetrominoes(pieces=scenes.pieces, grid=scenes.grid, cell=scenes.cell)


def _render(
    scenes: ScenesSection, folder: Path, sizes: list[int], first: int, progress: Progress, bar: TaskID
) -> Index:
    about = {"scenes": scenes.model_dump(mode="json"), "set": folder.name, "masks": True}
    shards = [(renderer(scenes), scenes.seed, first + number, size) for number, size in enumerate(sizes)]
    try:
        return _rendered(folder, shards, about, over_ray, progress, bar)
    except ValueError as error:
        raise DataError(f"data.scenes: a shard could not be rendered: {error}") from error


def _shard_sizes(samples: int, per_shard: int) -> list[int]:
    return [min(per_shard, samples - start) for start in range(0, samples, per_shard)]


# --- work on shards, spread over Ray -----------------------------------------------------------------------------


Spread = Callable[[Callable[..., Iterable[Any]], Sequence[tuple[Any, ...]]], Iterator[tuple[int, Any]]]
"""Runs a function of each of some arguments, and yields (number of the arguments, result) as results come."""


def over_ray(function: Callable[..., Iterable[Any]], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """What each call yields, in the order in which it comes, from tasks on the cluster's workers.

    Raises:
        Exception: what a call raised; the others end when Ray is shut down.
        DataError: a worker died.
    """
    import ray

    task = ray.remote(num_cpus=1, num_returns="streaming")(function)
    waiting = list(enumerate(calls))[::-1]
    ahead = 2 * max(1, int(_cpus()))  # arguments of calls that nobody can run yet stay here, not in Ray's memory
    running: dict[Any, int] = {}  # by the generator of a call's results
    while waiting or running:
        while waiting and len(running) < ahead:
            number, arguments = waiting.pop()
            running[task.remote(*arguments)] = number
        ready: list[Any] = ray.wait(list(running), num_returns=1)[0]
        for results in ready:
            try:
                yield running[results], ray.get(next(results))
            except StopIteration:
                del running[results]
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, Exception) else DataError(str(error))) from None
            except ray.exceptions.RayError as error:
                raise DataError(f"a worker died ({error}); what is whole stays, say the same again") from error


def in_process(function: Callable[..., Iterable[Any]], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """The same, one call after the other, without Ray."""
    for number, arguments in enumerate(calls):
        for result in function(*arguments):
            yield number, result


def make_set(
    scenes: Renderer,
    name: str,
    out: Path,
    counts: tuple[int, int],
    per_shard: int,
    seed: int,
    spread: Spread,
    progress: Progress,
) -> list[Index]:
    """Render `out`/train and `out`/eval, each scene in one of them only; how they are cut into shards changes no scene.

    Args:
        scenes: what renders; `name` is recorded with its fields.
        counts: training scenes, and held-out scenes, which may be 0.

    Raises:
        ValueError: the scenes cannot be rendered.
        DataError: a folder holds other shards.
    """
    fields: dict[str, Any] = asdict(scenes) if is_dataclass(scenes) and not isinstance(scenes, type) else {}
    about = {"scenes": {"set": name, "seed": seed, **json.loads(json.dumps(fields))}, "masks": True}
    bar = progress.add_task(f"rendering {name}", total=sum(counts))
    indices: list[Index] = []
    shards = scene = 0  # counted on through both sets: other numbers, other scenes
    for part, count in zip(SETS, counts, strict=True):
        of_set = []
        for size in _shard_sizes(count, per_shard):
            of_set.append((scenes, seed, shards, size, scene))
            shards, scene = shards + 1, scene + size
        if of_set:
            indices.append(_rendered(out / part, of_set, about | {"set": part}, spread, progress, bar))
    return indices


def ingest_source(job: Ingest, out: Path, spread: Spread, progress: Progress, workers: int) -> Ingested:
    """Bring a source into `out`/train and `out`/eval.

    Raises:
        DataError: a record is bad and bad ones are not skipped, or the source does not hold together.
    """
    bar = progress.add_task(f"reading {job.source.format}", total=None)
    pieces = job.pieces(workers)
    known = [piece.samples for piece in pieces]
    total = None if None in known else sum(count for count in known if count is not None)
    progress.update(bar, description=f"ingesting {job.source.format}", total=total)
    written: list[Written] = []
    for _, done in spread(_write_piece, [(piece, out) for piece in pieces]):
        written.append(done)
        progress.advance(bar, done.shard.samples if done.shard else 0)
    return job.finish(out, written)


def index_set(folder: Path, spread: Spread, progress: Progress) -> Index:
    """Index an existing folder of tars.

    Raises:
        DataError: there is no tar, or one is damaged.
    """
    names = tar_names(folder)
    bar = progress.add_task("indexing shards", total=len(names))
    shards: dict[int, Shard] = {}
    for number, shard in spread(_index_one, [(folder, name) for name in names]):
        shards[number] = shard
        progress.advance(bar)
    return write_index(folder, [shards[number] for number in range(len(names))], INDEXED)


def verify_set(folder: Path, index: Index, spread: Spread, progress: Progress) -> Iterator[str]:
    """Check every shard of a set; a sentence for each problem, as it is found."""
    expected = expected_kinds(folder, index)
    bar = progress.add_task("verifying samples", total=index.num_samples)
    calls = [(folder, shard, index.size, expected) for shard in index.shards]
    for number, problems in spread(_verify_one, calls):
        yield from problems
        progress.advance(bar, index.shards[number].samples)
    yield from unlisted(folder, index)


def scene_set(name: str, options: Sequence[str]) -> Renderer:
    """A renderer with some of its fields changed.

    Args:
        options: `field=value`, the value in YAML: `pieces=[2, 4]`.

    Raises:
        ValueError: the set, a field or a value is wrong.
    """
    if name not in RENDERERS:
        raise ValueError(f"{name!r} is not a set that is rendered here; use one of {', '.join(RENDERERS)}")
    scenes = RENDERERS[name]
    assert is_dataclass(scenes) and not isinstance(scenes, type)
    fields = asdict(scenes)
    changed: dict[str, Any] = {}
    for option in options:
        field, equals, value = option.partition("=")
        if not equals or field not in fields:
            raise ValueError(f"--set {option}: not a field=value of {name}; its fields are {', '.join(fields)}")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {option}: not a value ({error}); write it as in YAML") from error
        changed[field] = tuple(parsed) if isinstance(parsed, list) else parsed
    try:
        renderer: Renderer = replace(scenes, **changed)
        renderer.render(0, 0, 1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    return renderer


def _rendered(
    folder: Path,
    shards: Sequence[tuple[Any, ...]],
    about: Mapping[str, Any],
    spread: Spread,
    progress: Progress,
    bar: TaskID,
) -> Index:
    """A set of rendered shards, and its index; a shard is what `render_shard` takes after the folder."""
    made: dict[int, Shard] = {}
    for number, shard in spread(_render_one, [(folder, *arguments) for arguments in shards]):
        made[number] = shard
        progress.advance(bar, shard.samples)
    if foreign := {path.name for path in folder.glob("*.tar")} - {shard.name for shard in made.values()}:
        raise DataError(
            f"{folder}: holds {min(foreign)}, which is not a shard of this set ({len(foreign)} such files); "
            "remove them or name another folder"
        )
    return write_index(folder, [made[number] for number in range(len(shards))], about)


def _render_one(folder: Path, *arguments: Any) -> Iterator[Shard]:
    yield render_shard(folder, *arguments)


def _write_piece(piece: Piece, out: Path) -> Iterator[Written]:
    yield from piece.write(out)


def _index_one(folder: Path, name: str) -> Iterator[Shard]:
    yield index_shard(folder, name)


def _verify_one(
    folder: Path, shard: Shard, size: tuple[int, int] | None, expected: frozenset[str] | None
) -> Iterator[list[str]]:
    yield verify_shard(folder, shard, size, expected)


def _cpus() -> float:
    import ray

    return float(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
