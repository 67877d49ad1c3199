"""A set of shards by address: its index, and the address of each shard.

data/train                        a folder with an index.json
s3://bucket/{a,b}                 several folders, one set
data/{a,b}/{000..099}.tar         these shards of the sets in data/a and data/b
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipelines import shards
from pipelines.errors import DataError
from pipelines.index import Index
from pipelines.mixture import Mixture
from pipelines.shards import INDEX, Sidecar
from pipelines.sources import AbsentError, Sources, join, local_path, shown

__all__ = ["Place", "Sets", "WeightedSet", "expanded", "fetch_sidecar", "mixture", "place_of", "read_index"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WeightedSet:
    """A set in a mixture: its address, and the share of its samples in a batch, relative to the other sets'."""

    url: str
    weight: float = 1.0


class Sets(tuple[WeightedSet, ...]):
    """Several sets; as text they are JSON, which `place_of` reads."""

    __slots__ = ()

    def __str__(self) -> str:
        return json.dumps([asdict(entry) for entry in self])


Place = Path | str | Sets
"""Where a run's shards are: a folder of this machine, an address or brace pattern, or several of them by weight."""


def place_of(text: str) -> Place:
    """The place that a text stands for: `str` of a place, or an address."""
    if text.startswith("[{"):
        return Sets(WeightedSet(**entry) for entry in json.loads(text))
    path = local_path(text)
    return path if path is not None and expanded(text) == [text] and path.suffix != ".tar" else text


def mixture(sets: Sets, sources: Sources, *, batch_size: int, seed: int, lanes: int, window: int) -> Mixture:
    """The order of several sets, mixed by weight.

    Raises:
        DataError: as `read_index`.
    """
    parts = [(entry.url, read_index(entry, sources)) for entry in sets]
    weighted = [(index, entry.weight) for (_, index), entry in zip(parts, sets, strict=True)]
    return Mixture(weighted, _joined(parts), batch_size=batch_size, seed=seed, lanes=lanes, window=window)


def read_index(where: Path | str | WeightedSet | Sequence[WeightedSet], sources: Sources | None = None) -> Index:
    """The index of a complete set, or of several, joined in the given order.

    Args:
        where: a folder, its address, a brace pattern of folders or of tars, or several of these.

    Raises:
        DataError: an index is missing, unreadable, does not match its own digest, or does not list a shard that is
            asked for; the image sizes differ; the storage does not answer.
    """
    if isinstance(where, Path):
        return shards.read_index(where)
    if not isinstance(where, str | WeightedSet):
        parts = [(entry.url, read_index(entry, sources)) for entry in where]
        return _joined(parts) if len(parts) > 1 else parts[0][1]
    url = where.url if isinstance(where, WeightedSet) else where
    sources = sources or Sources()
    urls = expanded(url)
    if not any(entry.endswith(".tar") for entry in urls):
        found = [(entry, _index_of(entry, sources, url)) for entry in urls]
        return found[0][1] if urls == [url] else _joined(found)
    by_folder: dict[str, list[str]] = {}
    for entry in urls:
        folder, _, name = entry.rpartition("/")
        by_folder.setdefault(folder or ".", []).append(name)
    return _joined(
        [(folder, _selected(_index_of(folder, sources, url), names, folder)) for folder, names in by_folder.items()]
    )


def expanded(url: str) -> list[str]:
    """The addresses that a brace pattern stands for, in order; a command's braces are its own.

    Raises:
        DataError: the braces do not match, or stand for nothing.
    """
    if url.startswith("pipe:"):
        return [url]
    from braceexpand import braceexpand

    try:
        urls = list(braceexpand(url))
    except ValueError as error:
        raise DataError(f"{shown(url)}: {error}; write a range as {{000..099}} and a choice as {{a,b}}") from error
    if twice := len(urls) - len(set(urls)):
        raise DataError(f"{shown(url)}: it stands for {twice} addresses twice; name each shard once")
    return urls


def fetch_sidecar(folder: str, name: str, sources: Sources) -> Sidecar:
    """The sidecar of a shard.

    Raises:
        DataError: it is missing or not a sidecar.
        TransientError: the storage does not answer.
    """
    if (path := local_path(folder)) is not None:
        return shards.read_sidecar(path, name)
    file = f"{name}.offsets.json"
    try:
        content = sources.read(join(folder, file))
    except AbsentError as error:
        raise DataError(str(error)) from None
    return shards.parse_sidecar(content, shown(join(folder, file)))


def _index_of(folder: str, sources: Sources, asked: str) -> Index:
    cure = f"{shown(folder)}: no {INDEX} in it; write one where the shards lie: slotforge shards index {shown(folder)}"
    if (path := local_path(folder)) is not None:
        if folder != asked and not (path / INDEX).is_file():
            raise DataError(cure)
        return shards.read_index(path)
    try:
        content = sources.read(join(folder, INDEX))
    except AbsentError:
        raise DataError(cure) from None
    return shards.parse_index(content, shown(join(folder, INDEX)))


def _selected(index: Index, names: Iterable[str], folder: str) -> Index:
    listed = {shard.name: shard for shard in index.shards}
    if missing := [name for name in names if name not in listed]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise DataError(
            f"{shown(folder)}/{missing[0]}{more}: not in the folder's {INDEX}; correct the pattern, or index it again: "
            f"slotforge shards index {shown(folder)}"
        )
    return replace(index, shards=tuple(listed[name] for name in names))


def _joined(sets: Sequence[tuple[str, Index]]) -> Index:
    try:
        return Index.joined(sets)
    except ValueError as error:
        raise DataError(str(error)) from error
