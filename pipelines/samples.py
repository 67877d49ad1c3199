"""One sample: its members in a shard, and its arrays.

    key.image.png | .jpg | .jpeg | .webp      8 bits, colour or grey; `image.` may be missing
    key.masks.png | .npy                      ids of 8 or 16 bits [H, W], 0 is background (optional)
    key.json                                  {"num_objects": int, "factors": {name: [one value an object]}} (optional)

Decoding is a pure function of the members' bytes: a sample that fails once fails always and for every reader.
"""

import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines import codecs

_FORMATS = ("png", "jpg", "jpeg", "webp")
IMAGE_MEMBERS = tuple(f"image.{format}" for format in _FORMATS) + _FORMATS
MASK_MEMBERS = ("masks.png", "masks.npy")
MOST_OBJECTS = 2**16 - 1
UNKNOWN = -1


class BadSample(ValueError):
    """A sample that can never be used; the message says why."""


class Sample(NamedTuple):
    """A decoded sample.

    Fields:
        image: uint8 [H, W, 3].
        masks: uint8 or uint16 [H, W], 0 is background; None where the sample has none or none were asked for.
        num_objects: -1 where unknown.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.uint8] | NDArray[np.uint16] | None
    num_objects: int


def encode(
    key: str,
    image: NDArray[np.uint8],
    masks: NDArray[np.uint8] | NDArray[np.uint16] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The members of one sample, as webdataset's writer takes them.

    Args:
        key: unique in the set, without dots.
        image: uint8 [H, W, 3].
        masks: uint8 or uint16 [H, W], 0 is background.
        facts: what goes into key.json: `num_objects` and `factors`.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{key}: image is {image.dtype} {list(image.shape)}; it must be uint8 [H, W, 3]")
    members: dict[str, Any] = {"__key__": key, "image.png": _png(image)}
    if masks is not None:
        if masks.dtype not in (np.uint8, np.uint16) or masks.shape != image.shape[:2]:
            raise ValueError(
                f"{key}: masks are {masks.dtype} {list(masks.shape)}; they must be uint8 or uint16 "
                f"{list(image.shape[:2])}"
            )
        members["masks.png"] = _png(masks)
    if facts is not None:
        members["json"] = json.dumps(facts, separators=(",", ":"), sort_keys=True).encode()
    return members


def decode(
    members: Mapping[str, Any],
    with_masks: bool,
    size: tuple[int, int] | None = None,
    out: NDArray[np.uint8] | None = None,
) -> Sample:
    """Decode a sample as webdataset groups it: bytes by member name.

    Args:
        with_masks: decode the masks, which must be there.
        size: (height, width) that the image must have; None takes any.
        out: uint8 [*size, 3], contiguous; the image is decoded into it, where that saves a copy.

    Raises:
        BadSample: a member is missing, cannot be decoded, or has the wrong size.
    """
    name = next((name for name in IMAGE_MEMBERS if name in members), None)
    if name is None:
        raise BadSample("it has no image member (image.png, image.jpg, image.webp)")
    image = _decoded(name, members[name], lambda data: codecs.rgb(data, out))
    if size is not None and image.shape[:2] != size:
        raise BadSample(f"{name} is {image.shape[0]}x{image.shape[1]}, the set is {size[0]}x{size[1]}")
    masks = None
    if with_masks:
        name = next((name for name in MASK_MEMBERS if name in members), None)
        if name is None:
            raise BadSample("it has no masks member (masks.png, masks.npy)")
        masks = _decoded(name, members[name], _npy if name.endswith("npy") else codecs.ids)
        if masks.shape != image.shape[:2]:
            raise BadSample(f"{name} is {list(masks.shape)}, its image {list(image.shape[:2])}")
    return Sample(image, masks, _decoded("json", members["json"], _num_objects) if "json" in members else UNKNOWN)


def _decoded(name: str, data: bytes, codec: Any) -> Any:
    try:
        return codec(data)
    except MemoryError:  # says something about this machine, not about the bytes
        raise
    except UnidentifiedImageError:
        raise BadSample(f"{name} cannot be decoded (no image format that is known)") from None
    except Exception as error:  # Pillow raises whatever its codecs stumble over: the bytes are at fault
        raise BadSample(f"{name} cannot be decoded ({type(error).__name__}: {error})") from error


def _png(pixels: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _npy(data: bytes) -> NDArray[np.uint8] | NDArray[np.uint16]:
    ids = np.load(io.BytesIO(data), allow_pickle=False)
    if ids.ndim != 2 or ids.dtype.kind not in "ui" or ids.min(initial=0) < 0 or ids.max(initial=0) > MOST_OBJECTS:
        raise ValueError(f"{ids.dtype} {list(ids.shape)} does not hold ids 0 .. {MOST_OBJECTS} [H, W]")
    narrow: NDArray[np.uint8] | NDArray[np.uint16] = ids.astype(np.uint8 if ids.max(initial=0) < 256 else np.uint16)
    return narrow


def _num_objects(data: bytes) -> int:
    facts = json.loads(data)
    count = facts.get("num_objects", UNKNOWN)
    if type(count) is not int or count < UNKNOWN:
        raise ValueError(f"num_objects: {count!r} is not a count")
    return count
