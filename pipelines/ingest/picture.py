"""A picture with its masks as a source has them, framed and written as one sample."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipelines.errors import DataError
from pipelines.samples import MOST_OBJECTS, encode
from pipelines.transforms import crop_centre, crop_clevr, resize_bilinear, resize_nearest

CROPS = ("centre", "clevr", "none")
_UNTOUCHED = {"JPEG": "image.jpg", "PNG": "image.png"}
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class BadRecord(DataError):
    """A record of a source that cannot be used; the message says why."""


@dataclass(frozen=True)
class Picture:
    """One image of a source.

    Fields:
        image: uint8 [H, W, 3].
        masks: integers [H, W], 0 is background, i is the i-th object; None where the source has none.
        num_objects: where the source itself tells; then ids and factors stay as they are. Else the objects in view
            are counted, and ids renumbered to 1, 2, ... in order.
        factors: one value an object by name.
        facts: anything else for the sample's JSON.
        encoded: the member that holds the image as it came (`image.jpg` or `image.png`) and its bytes, for where
            nothing is cut or resized.
    """

    image: NDArray[np.uint8]
    masks: NDArray[Any] | None = None
    num_objects: int | None = None
    factors: Mapping[str, list[Any]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    encoded: tuple[str, bytes] | None = None


@dataclass(frozen=True)
class Framing:
    """How pictures are cut and resized.

    Fields:
        size: pixels a side of the square that comes out; None keeps what the crop leaves.
        crop: `centre` (the largest square in the middle), `clevr` (the published rows 29:221 and columns 64:256 of
            240x320; resized without smoothing, as published) or `none`. The default is centre where a size is given.

    Raises:
        ValueError: a field is out of range.
    """

    size: int | None = None
    crop: str | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: {self.size} is less than 1; use a positive number of pixels")
        if self.crop is not None and self.crop not in CROPS:
            raise ValueError(f"crop: {self.crop!r} is not known; use one of {', '.join(CROPS)}")

    def __call__(self, picture: Picture) -> Picture:
        """Cut and resize.

        Raises:
            ValueError: the crop does not fit the picture.
        """
        image, masks = picture.image, picture.masks
        crop = self.crop or ("none" if self.size is None else "centre")
        if crop != "none":
            cut = crop_clevr if crop == "clevr" else crop_centre
            image, masks = cut(image), None if masks is None else cut(masks)
        if self.size is not None and image.shape[:2] != (self.size, self.size):
            square = (self.size, self.size)
            image = resize_bilinear(image, square) if crop == "clevr" else _smoothed(image, square)
            masks = None if masks is None else resize_nearest(masks, square)
        untouched = image.shape == picture.image.shape
        return _in_view(
            Picture(
                image=np.ascontiguousarray(image),
                masks=masks,
                num_objects=picture.num_objects,
                factors=picture.factors,
                facts=picture.facts,
                encoded=picture.encoded if untouched else None,
            )
        )


def members(key: str, source: str, picture: Picture) -> dict[str, Any]:
    """A framed picture as a sample: JPEG and PNG bytes as they came where they may stay, masks as PNG, JSON.

    Args:
        key: unique in the set.
        source: goes into the JSON: where the picture comes from.

    Raises:
        ValueError: a shape is wrong, or what is written could not be read again.
    """
    facts: dict[str, Any] = {"source": source, **picture.facts}
    if picture.num_objects is not None:
        facts["num_objects"] = picture.num_objects
    if picture.factors:
        facts["factors"] = dict(picture.factors)
    most = 0 if picture.masks is None else int(picture.masks.max(initial=0))
    if most > MOST_OBJECTS:
        raise ValueError(f"{most} objects are more than 16 bits tell apart")
    masks: NDArray[Any] | None = None
    if picture.masks is not None:
        masks = picture.masks.astype(np.uint8 if most < 256 else np.uint16)
    if picture.encoded is None:
        return encode(key, picture.image, masks, facts)
    name, data = picture.encoded
    sample = {"__key__": key, name: data, "json": json.dumps(facts, separators=(",", ":"), sort_keys=True).encode()}
    if masks is not None:
        sample["masks.png"] = png(masks)
    return sample


def decoded(data: bytes, upright: bool = False) -> Picture:
    """A picture without masks from an encoded image.

    Args:
        data: in a format that Pillow knows, 8 bits a channel.
        upright: turn it as its EXIF says.

    Raises:
        ValueError, OSError, SyntaxError, Image.DecompressionBombError: it cannot be decoded.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in _EIGHT_BITS:
            raise ValueError(f"an image of mode {image.mode} has more than 8 bits a channel; save it with 8")
        turned = ImageOps.exif_transpose(image) if upright else image
        as_it_is = turned.mode in ("RGB", "L") and image.getexif().get(0x0112, 1) == 1 and not _moves(image)
        name = _UNTOUCHED.get(str(image.format)) if as_it_is else None
        pixels = np.array(turned.convert("RGB"))  # [H, W, 3]
    return Picture(pixels, encoded=None if name is None else (name, data))


def decoded_ids(data: bytes) -> NDArray[Any]:
    """Ids of a mask image: grey of 8 or 16 bits, or a palette, whose indices count. -> integers [H, W].

    Raises:
        ValueError, OSError, SyntaxError, Image.DecompressionBombError: it cannot be decoded or holds no ids.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("L", "P", "I;16"):
            raise ValueError(f"a mask of mode {image.mode} holds no ids; save it in grey of 8 or 16 bits, or a palette")
        return np.array(image)


def png(pixels: NDArray[Any]) -> bytes:
    """uint8 or uint16 [H, W] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _moves(image: Image.Image) -> bool:
    return bool(getattr(image, "is_animated", False))


def _smoothed(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.array(Image.fromarray(np.ascontiguousarray(image)).resize(size[::-1], Image.Resampling.BILINEAR))


def _in_view(picture: Picture) -> Picture:
    """Renumber the objects that are still in view, unless the source itself says how many there are."""
    masks = picture.masks
    if masks is None or picture.num_objects is not None:
        return picture
    present = np.flatnonzero(np.bincount(masks.ravel())[1:]) + 1  # [n] ids of the objects in view, in order
    label = np.zeros(int(masks.max(initial=0)) + 1, dtype=np.int64)
    label[present] = np.arange(1, len(present) + 1)
    renumbered = label[masks]
    return Picture(
        image=picture.image,
        masks=renumbered,
        num_objects=len(present),
        factors={name: [values[i - 1] for i in present.tolist()] for name, values in picture.factors.items()},
        facts=picture.facts,
        encoded=picture.encoded,
    )
