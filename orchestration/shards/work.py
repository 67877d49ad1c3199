"""Work on shards, a shard a task: spread over Ray, or in this process."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.progress import Progress, TaskID

from orchestration.clusters.capacity import cluster_capacity
from pipelines import DataError, Index, Shard, write_index
from pipelines.ingest import Ingest, Ingested, Piece, Written
from pipelines.ingest.job import SETS
from pipelines.scenes import RENDERERS, Renderer
from pipelines.scenes.render import render_shard
from pipelines.shards import INDEXED, expected_kinds, index_shard, tar_names, unlisted, verify_shard

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
    # Arguments of calls that nobody can run yet stay here, not in Ray's memory.
    ahead = 2 * max(1, int(cluster_capacity().cpus))
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
        for size in shard_sizes(count, per_shard):
            of_set.append((scenes, seed, shards, size, scene))
            shards, scene = shards + 1, scene + size
        if of_set:
            indices.append(rendered(out / part, of_set, about | {"set": part}, spread, progress, bar))
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


def scene_set(name: str, fields: Mapping[str, Any]) -> Renderer:
    """A renderer with some of its fields changed.

    Raises:
        ValueError: the set, a field or a value is wrong.
    """
    if name not in RENDERERS:
        raise ValueError(f"{name!r} is not a set that is rendered here; use one of {', '.join(RENDERERS)}")
    scenes = RENDERERS[name]
    assert is_dataclass(scenes) and not isinstance(scenes, type)
    known = asdict(scenes)
    if unknown := fields.keys() - known.keys():
        raise ValueError(f"{name} has no field {min(unknown)}; its fields are {', '.join(known)}")
    try:
        renderer: Renderer = replace(scenes, **fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    return renderer


def scene_fields(options: Sequence[str]) -> dict[str, Any]:
    """Fields of a renderer from `field=value`, the value in YAML: `pieces=[2, 4]`.

    Raises:
        ValueError: an option is not that.
    """
    fields: dict[str, Any] = {}
    for option in options:
        field, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--set {option}: not a field=value; write e.g. --set 'pieces=[2, 4]'")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {option}: not a value ({error}); write it as in YAML") from error
        fields[field] = tuple(parsed) if isinstance(parsed, list) else parsed
    return fields


def shard_sizes(samples: int, per_shard: int) -> list[int]:
    return [min(per_shard, samples - start) for start in range(0, samples, per_shard)]


def rendered(
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
