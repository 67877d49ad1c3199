"""Images in: what is taken, decoded within limits, and cut to the square that a model sees."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines import codecs
from pipelines.ingest.picture import Framing, Picture

Pixels = NDArray[np.uint8]
FORMATS = ("PNG", "JPEG")
_ORIENTATION = 0x0112  # of EXIF


class ImageError(Exception):
    """What was given is not an image that can be used; the message says why."""


class TooLargeError(ImageError):
    """It is over a limit; nothing of it was decoded."""


@dataclass(frozen=True)
class Limits:
    """What one request may hold.

    Fields:
        bytes: of its body.
        pixels: of its images together, before they are resized; 3 bytes each once decoded.
        images: in it.
    """

    bytes: int = 16 * 2**20
    pixels: int = 2**25
    images: int = 64


@dataclass(frozen=True)
class Framed:
    """What a model sees of an image.

    Fields:
        pixels: uint8 [S, S, 3].
        box: (left, top, right, bottom) of what it sees, in pixels of the upright image.
    """

    pixels: Pixels
    box: tuple[int, int, int, int]


def decoded(data: bytes, most_pixels: int) -> Pixels:
    """A PNG or JPEG, upright, as uint8 [H, W, 3].

    Its header is read first: what is too large is refused before anything is unpacked.

    Raises:
        TooLargeError: it has more pixels.
        ImageError: it is neither, or damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
            if width * height > most_pixels:
                raise TooLargeError(f"{width}x{height} is over the limit of {most_pixels} pixels; send it smaller")
            orientation = header.getexif().get(_ORIENTATION, 1)
        pixels = codecs.rgb(data)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("neither a PNG nor a JPEG") from None
    except Image.DecompressionBombError:
        raise TooLargeError(f"its size is over the limit of {most_pixels} pixels; send it smaller") from None
    except Exception as error:  # Pillow raises whatever its codecs stumble over: the bytes are at fault
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {error})") from error
    return pixels if orientation == 1 else _upright(pixels, orientation)


def framed(image: Pixels, side: int) -> Framed:
    """The largest square in the middle, resized smoothly, as `shards ingest --size` does. image: uint8 [H, W, 3]."""
    height, width = image.shape[:2]
    edge = min(height, width)
    left, top = (width - edge) // 2, (height - edge) // 2
    return Framed(Framing(side)(Picture(image)).image, (left, top, left + edge, top + edge))


def from_arrays(values: Any) -> NDArray[np.uint8]:
    """Nested lists of whole numbers 0 to 255 as images [N, H, W, 3].

    Raises:
        ImageError: they are not that.
    """
    try:
        images = np.asarray(values)
    except ValueError:
        raise ImageError("rows of different lengths; give whole numbers [N, H, W, 3]") from None
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape or images.dtype.kind not in "iu":
        raise ImageError(f"{images.dtype} {list(images.shape)}; give whole numbers [N, H, W, 3]")
    if images.min() < 0 or images.max() > 255:
        raise ImageError(f"values from {images.min()} to {images.max()}; give 0 to 255")
    return images.astype(np.uint8)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    image = Image.fromarray(pixels)
    image.getexif()[_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image), dtype=np.uint8)
