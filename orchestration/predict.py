"""A registered model on images of one's own: an overlay and a JSON for each."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.image import imsave
from PIL import Image, ImageOps, UnidentifiedImageError

from orchestration.pictures import overlay, scene_figure
from orchestration.registry.loading import load


class ImageError(Exception):
    """A file that is not an image."""


@dataclass(frozen=True)
class Prediction:
    """What was found in an image, and where it is written."""

    image: Path
    objects: int
    overlay: Path
    facts: Path


def predict(paths: Iterable[Path], model: str, tracking: str, out: Path) -> list[Prediction]:
    """Finds the objects in images of any size: they are cut to a square and resized to the model's size.

    Writes to ``out``, for each image: an overlay, the slots side by side, and a JSON of kept slots.

    Raises:
        ImageError: a file is missing or not an image.
        ValueError: the model is not one of the registry.
    """
    paths = list(paths)
    for path in paths:
        if [other.stem for other in paths].count(path.stem) > 1:
            raise ImageError(f"{path}: another image is called {path.stem} too; rename one, or predict them one by one")
    packaged = load(model, tracking)
    size = packaged.image_size
    out.mkdir(parents=True, exist_ok=True)
    predictions = []
    for path in paths:
        image = _read(path, size)[None]  # [1, H, W, 3]
        output = packaged.run(image)
        keep = output.keep[0] > 0.5
        objects = max(0, int(keep.sum()) - packaged.background_slots)
        prediction = Prediction(path, objects, out / f"{path.stem}.masks.png", out / f"{path.stem}.json")
        masks = output.masks_at(size, size)[0].numpy()  # [K, H, W]
        imsave(prediction.overlay, np.repeat(np.repeat(overlay(image[0], masks), 8, 0), 8, 1))
        scene_figure(image, output).savefig(out / f"{path.stem}.slots.png")
        facts = {
            "image": path.name,
            "model": model,
            "objects": objects,
            "keep": keep.tolist(),
            "keep_probability": [round(value, 6) for value in output.keep_probability[0].tolist()],
            "mask_share": [round(value, 6) for value in output.masks[0].mean(dim=(1, 2)).tolist()],
        }
        prediction.facts.write_text(json.dumps(facts, indent=1))
        predictions.append(prediction)
    return predictions


def _read(path: Path, size: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(
                ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.BILINEAR
            )
    except (OSError, UnidentifiedImageError) as error:
        raise ImageError(f"{path}: this is not an image that can be read ({error}); give a PNG or JPEG") from error
    return np.asarray(square, dtype=np.uint8)
