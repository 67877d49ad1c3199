"""What is written of a set, a part at a time: a part is there whole, or not at all.

    predictions.json      of which set, by which version of which model; written first
    NAME-0000.tar         of each image KEY: KEY.labels.png and KEY.overlay.png, at the size that the model sees
    NAME-0000.jsonl       a line for each image, in order: its key with what was found, or with an error; written last

A part is some images of one shard, in order; how a set is cut into parts follows from the set alone.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.files import read_json, write_bytes, write_json
from orchestration.serving.found import Found, png
from orchestration.serving.sources import Source

PER_PART = 256
MANIFEST = "predictions.json"
_VERSION = 1


class PartsError(Exception):
    """The folder holds predictions of something else."""


@dataclass(frozen=True)
class Part:
    """Images [first, last) of a unit of a source.

    Fields:
        name: of its files.
    """

    name: str
    unit: int
    first: int
    last: int


def parts_of(source: Source) -> list[Part]:
    """A whole set, cut into parts."""
    return [
        Part(f"{name}-{number:04d}", unit, first, min(first + PER_PART, images))
        for unit, (name, images) in enumerate(source.units)
        for number, first in enumerate(range(0, images, PER_PART))
    ]


def claim(out: Path, source: Source, model: str) -> None:
    """Makes the folder one of this set and this model.

    Raises:
        PartsError: it is another's already.
    """
    wanted = {"version": _VERSION, "model": model, "set": source.shown, "digest": source.digest}
    if (out / MANIFEST).exists():
        there = read_json(out / MANIFEST)
        compared = ("version", "model", "digest")  # the same images may lie elsewhere now
        if changed := [key for key in compared if there.get(key) != wanted[key]]:
            told = ", ".join(f"{key} {there.get(key)} there, {wanted[key]} now" for key in changed)
            raise PartsError(f"--out {out}: holds other predictions ({told}); name another folder, or remove it")
        return
    write_json(out / MANIFEST, wanted)


@dataclass(frozen=True)
class Work:
    """What is left to do for a set.

    Fields:
        missing: parts that are not there whole, by unit.
        there: images of the others.
        failed: those of them that could not be predicted, each with the reason.
    """

    missing: list[list[Part]]
    there: int
    failed: list[str]

    @property
    def images(self) -> int:
        """Images of the missing parts."""
        return sum(part.last - part.first for parts in self.missing for part in parts)


def left_of(source: Source, out: Path) -> Work:
    """What is not there yet of a claimed folder."""
    missing: dict[int, list[Part]] = {}
    there, failed = 0, []
    for part in parts_of(source):
        if _tar(out, part).is_file() and _facts(out, part).is_file():
            there += part.last - part.first
            failed += _failures(json.loads(line) for line in _facts(out, part).read_bytes().splitlines())
        else:
            missing.setdefault(part.unit, []).append(part)
    return Work(list(missing.values()), there, failed)


def write(out: Path, part: Part, keys: Sequence[str], found: Iterable[Found | str]) -> list[str]:
    """Writes a part; returns the images that failed, with the reason.

    Args:
        found: of each key, or why there is nothing.
    """
    lines: list[dict[str, Any]] = []
    pictures = io.BytesIO()
    with tarfile.open(fileobj=pictures, mode="w") as tar:
        for key, entry in zip(keys, found, strict=True):
            if isinstance(entry, str):
                lines.append({"key": key, "error": entry})
                continue
            lines.append({"key": key, **entry.facts()})
            for kind, picture in (("labels", entry.labels()), ("overlay", entry.overlay(enlarge=False))):
                content = png(picture)
                member = tarfile.TarInfo(f"{key}.{kind}.png")  # without owner and time: equal images, equal bytes
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    write_bytes(_tar(out, part), pictures.getvalue())
    write_bytes(_facts(out, part), "".join(json.dumps(line) + "\n" for line in lines).encode())
    return _failures(lines)


def _failures(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    return [f"{line['key']}: {line['error']}" for line in lines if "error" in line]


def _tar(out: Path, part: Part) -> Path:
    return out / f"{part.name}.tar"


def _facts(out: Path, part: Part) -> Path:
    return out / f"{part.name}.jsonl"
