"""What a job needs of this project, in one archive: the packages and the recipe, never data or an environment."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

LIMIT = 100 * 2**20
"""Bytes of an upload, from which on a Ray head refuses it."""
PARTS = ("slot_models", "pipelines", "orchestration", "recipes", "pyproject.toml")
NEVER = (".*", "__pycache__/", "*.py[co]", "*.whl", "*.tar")
IGNORES = (".gitignore", ".rayignore")
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same files, the same archive: Ray keeps it by its digest
_SHOWN = 5


class PackageError(Exception):
    """The project cannot be sent to a cluster."""


@dataclass(frozen=True)
class Package:
    """An archive for a job.

    Fields:
        path: the archive.
        bytes: its size.
        recipe: where the recipe is in it.
    """

    path: Path
    bytes: int
    recipe: str


def project_root() -> Path:
    """The folder that holds the project's packages: a clone, or where pip has put them."""
    return Path(__file__).resolve().parents[2]


def pack(recipe: Path, out: Path, root: Path | None = None) -> Package:
    """Packs the project with a recipe, which may lie anywhere.

    Args:
        recipe: a YAML file; it is packed as recipes/<its name>, in place of one of the project's.
        out: a folder for the archive.
        root: holds the packages; the project's own.

    Raises:
        PackageError: the archive would be too large for Ray; its largest files are named.
    """
    root, inside = root or project_root(), f"recipes/{recipe.name}"
    files = {name: root / name for name in _wanted(root)} | {inside: recipe}
    archive = out / "slotforge.zip"
    packed: dict[str, int] = {}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _LONG_AGO)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            zipped.writestr(entry, files[name].read_bytes())
            packed[name] = entry.compress_size
    size = archive.stat().st_size
    if size >= LIMIT:
        largest = sorted(packed, key=lambda name: -packed[name])[:_SHOWN]
        named = ", ".join(f"{root / name if name != inside else recipe} ({_mib(packed[name])})" for name in largest)
        raise PackageError(
            f"{root}: the package is {_mib(size)}, and Ray takes less than {_mib(LIMIT)}; move the largest files away "
            f"or name them in .gitignore: {named}"
        )
    return Package(archive, size, inside)


def _wanted(root: Path) -> Iterator[str]:
    """Files of the project that are not ignored, relative to its root, with slashes."""
    lines = [line for name in IGNORES if (root / name).is_file() for line in (root / name).read_text().splitlines()]
    ignored = GitIgnoreSpec.from_lines([*lines, *NEVER])
    for part in PARTS:
        place = root / part
        for path in [place] if place.is_file() else place.rglob("*"):
            name = path.relative_to(root).as_posix()
            if path.is_file() and not ignored.match_file(name):
                yield name


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
