"""A registered model on image files of one's own: pictures and a JSON for each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestration.files import write_bytes, write_json
from orchestration.kept_memory import keep_memory
from orchestration.serving.finder import Finder
from orchestration.serving.found import Found, png
from orchestration.serving.images import Framed, ImageError, framed
from orchestration.serving.sources import read_image

_AT_ONCE = 32


@dataclass(frozen=True)
class Prediction:
    """What was found in an image, and where it is written; or why there is nothing.

    Fields:
        image: the file.
        objects: how many; 0 where there is a reason.
        written: an overlay, the slots side by side, and a JSON.
        reason: why it could not be predicted.
    """

    image: Path
    objects: int = 0
    written: tuple[Path, ...] = ()
    reason: str | None = None


def predict(paths: Sequence[Path], finder: Finder, model: str, out: Path) -> Iterator[Prediction]:
    """Finds the objects in images of any size: they are cut to a square and resized to the model's size.

    Writes to ``out``, for each image NAME: NAME.masks.png, NAME.slots.png and NAME.json.

    Args:
        model: its name, for the JSON.

    Raises:
        ImageError: two images would be written under one name.
    """
    stems = [path.stem for path in paths]
    for path in paths:
        if stems.count(path.stem) > 1:
            raise ImageError(f"{path}: another image is called {path.stem} too; rename one, or predict them one by one")
    out.mkdir(parents=True, exist_ok=True)
    keep_memory()
    for start in range(0, len(paths), _AT_ONCE):
        images = [(path, _read(path, finder.side)) for path in paths[start : start + _AT_ONCE]]
        seen = [image.pixels for _, image in images if isinstance(image, Framed)]
        found = iter(finder.find(np.stack(seen)) if seen else [])
        for path, image in images:
            if isinstance(image, ImageError):
                yield Prediction(path, reason=str(image))
            else:
                yield _written(path, image, next(found), model, out)


def _read(path: Path, side: int) -> Framed | ImageError:
    try:
        return framed(read_image(path), side)
    except ImageError as error:
        return error


def _written(path: Path, image: Framed, found: Found, model: str, out: Path) -> Prediction:
    overlay, slots, facts = (out / f"{path.stem}{ending}" for ending in (".masks.png", ".slots.png", ".json"))
    write_bytes(overlay, png(found.overlay()))
    write_bytes(slots, png(found.strip()))
    write_json(facts, {"image": path.name, "model": model, "box": image.box, **found.facts()})
    return Prediction(path, found.objects, (overlay, slots, facts))
