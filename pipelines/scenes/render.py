"""Scenes into shards: one pure call per shard, for whoever maps it over workers."""

from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from pipelines.index import Shard
from pipelines.samples import encode
from pipelines.scenes.scenes import Renderer, Scenes
from pipelines.shards import kept_shard, write_shard

# Scenes in memory at a time. A scene does not depend on it.
_AT_ONCE = 1000


def render_shard(
    folder: Path | str, scenes: Renderer, seed: int, shard: int, count: int, first: int | None = None
) -> Shard:
    """Render a shard of scenes, with masks and factors, and write it as `{shard:06d}.tar`.

    The bytes are a function of the arguments. A whole shard that is already there and was made from the same
    arguments is kept, so a killed run goes on where it was.

    Args:
        scenes: a frozen dataclass that renders, such as `Tetrominoes`; its fields are recorded.
        seed, shard: tell scenes apart; two sets with one seed need distinct shard numbers.
        count: samples in the shard.
        first: index of the shard's first scene; the scenes are then the same however a set is cut into shards, and
            `shard` only names the file. None takes the rows of `shard`, which are scenes of its own.

    Raises:
        ValueError: the scenes cannot be rendered, or `count` is below 1.
    """
    name = f"{shard:06d}.tar"
    source = {
        "renderer": type(scenes).__name__,
        "fields": asdict(scenes) if is_dataclass(scenes) and not isinstance(scenes, type) else {},
        "seed": seed,
        "shard": shard,
        "count": count,
    }
    if first is not None:
        source["first"] = first
    return kept_shard(folder, name, source) or write_shard(
        folder, name, _samples(scenes, seed, shard, count, first), source
    )


def _samples(scenes: Renderer, seed: int, shard: int, count: int, first: int | None) -> Iterator[dict[str, Any]]:
    if first is None:
        yield from _encoded(scenes.render(seed, shard, count), shard, 0)
        return
    for row in range(0, count, _AT_ONCE):
        yield from _encoded(scenes.render_range(seed, first + row, min(_AT_ONCE, count - row)), shard, row)


def _encoded(scenes: Scenes, shard: int, first_row: int) -> Iterator[dict[str, Any]]:
    for row in range(len(scenes)):
        present = int(scenes.num_objects[row])
        facts = {
            "num_objects": present,
            "factors": {name: values[row, :present].tolist() for name, values in scenes.factors.items()},
        }
        yield encode(f"{shard:06d}-{first_row + row:06d}", scenes.images[row], scenes.masks[row], facts)
