"""Write and index shards: equal samples give equal bytes; a killed run leaves whole shards or nothing.

Everything is written under a temporary name and renamed; index.json comes last, so that a folder with one is complete.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.index import Index, Shard
from pipelines.shards.files import (
    INDEX,
    TEMPORARY,
    VERSION,
    read_sidecar,
    replacing,
    sidecar_path,
    write_json,
    write_sidecar,
)
from pipelines.shards.scan import scan, sha256_of, tar_names

INDEXED = {"indexed": "existing WebDataset shards"}


def write_shard(
    folder: Path | str,
    name: str,
    samples: Iterable[Mapping[str, Any]],
    source: Mapping[str, Any] | None = None,
    left_out: Sequence[str] = (),
) -> Shard:
    """Write one shard and its sidecar; equal samples give equal bytes.

    Args:
        folder: made if it is not there.
        name: file name, ending in .tar.
        samples: members by name and `__key__`, as `pipelines.samples.encode` makes them; at least one, keys distinct.
        source: what the samples are made from (JSON), for `kept_shard`.
        left_out: recorded in the sidecar; looked at when all samples are written, so that making them may add to it.

    Raises:
        ValueError: no samples, a key that is not new, or the name does not end in .tar.
        DataError: no sample can be decoded.
    """
    from webdataset.writer import TarWriter  # imports torch

    folder = Path(folder)
    if not name.endswith(".tar"):
        raise ValueError(f"shard name: {name!r} does not end in .tar; add it")
    folder.mkdir(parents=True, exist_ok=True)
    keys: set[str] = set()
    with replacing(folder / name) as file:
        # Fixed owner and time: the bytes are a function of the samples.
        with TarWriter(file, encoder=False, user="slotforge", group="slotforge", mtime=0) as writer:
            for sample in samples:
                key = sample["__key__"]
                if key in keys or "." in key or "/" in key:
                    raise ValueError(f"{name}: key {key!r} is taken or holds a dot or slash; use another")
                keys.add(key)
                writer.write(dict(sample))
        if not keys:
            raise ValueError(f"{name}: no samples; leave empty shards out of the set")
        file.flush()
        sidecar = replace(scan(Path(file.name), name, source), left_out=tuple(left_out))
        # From here on an index of this folder would not tell the truth.
        (folder / INDEX).unlink(missing_ok=True)
        # The sidecar goes first: killed in between, it does not match the tar and the shard is written again.
        write_sidecar(folder, sidecar)
    return sidecar.shard


def kept_shard(folder: Path | str, name: str, source: Mapping[str, Any]) -> Shard | None:
    """The shard of this name if it is whole, unchanged, and made from the same source; else None."""
    folder = Path(folder)
    try:
        sidecar = read_sidecar(folder, name)
        whole = sidecar.shard.name == name and sidecar.shard.sha256 == sha256_of(folder / name)
    except (DataError, FileNotFoundError):
        return None
    return sidecar.shard if whole and dict(sidecar.source) == json.loads(json.dumps(source)) else None


def write_index(folder: Path | str, shards: Iterable[Shard], about: Mapping[str, Any]) -> Index:
    """Complete a set: merge its shards' entries, in the given order, into index.json.

    Args:
        about: how the set was made (JSON), for people and for comparing with a recipe. Whether every sample has masks
            is added as `masks`: what lies in the shards counts, whatever `about` says.

    Raises:
        DataError: a sidecar is missing or belongs to another shard, or the image sizes differ.
        ValueError: no shards, or two of one name.
    """
    folder = Path(folder)
    shards = tuple(shards)
    sizes: dict[tuple[int, int], str] = {}
    masks: list[bool | None] = []
    for shard in shards:
        sidecar = read_sidecar(folder, shard.name)
        if sidecar.shard != shard:
            raise DataError(f"{sidecar_path(folder, shard.name)}: belongs to another shard; write {shard.name} again")
        sizes.setdefault(sidecar.size, shard.name)
        masks.append(sidecar.masks)
    if len(sizes) > 1:
        found = ", ".join(f"{name} {height}x{width}" for (height, width), name in sizes.items())
        raise DataError(f"{folder}: image sizes differ ({found}); resize to one size, for example with ingest")
    known = {} if None in masks else {"masks": all(masks)}
    index = Index(shards, size=next(iter(sizes), None), about=json.loads(json.dumps({**about, **known})))
    for leftover in folder.glob(f"*{TEMPORARY}"):  # of killed runs: the set is complete, nobody writes any more
        leftover.unlink(missing_ok=True)
    content = {
        "version": VERSION,
        "digest": index.digest,
        "samples": index.num_samples,
        "size": index.size,
        "about": index.about,
        "shards": [asdict(shard) for shard in shards],
    }
    write_json(folder / INDEX, content)
    return index


def index_folder(folder: Path | str, about: Mapping[str, Any] | None = None) -> Index:
    """Index an existing folder of WebDataset tars (*.tar, in natural order): sidecars and index.json beside them.

    Raises:
        DataError: there is no tar, or one is truncated, damaged or without a sample that can be decoded.
    """
    return write_index(folder, [index_shard(folder, name) for name in tar_names(folder)], about or INDEXED)


def index_shard(folder: Path | str, name: str) -> Shard:
    """Write the sidecar of an existing tar: the part of `index_folder` that can be spread over workers.

    Raises:
        DataError: it is truncated, damaged or without a sample that can be decoded.
    """
    folder = Path(folder)
    sidecar = scan(folder / name, name)
    with contextlib.suppress(DataError):  # what made the tar stays known for as long as the tar is the same
        before = read_sidecar(folder, name)
        if before.shard == sidecar.shard:
            sidecar = replace(sidecar, source=before.source, left_out=before.left_out)
    write_sidecar(folder, sidecar)
    return sidecar.shard
