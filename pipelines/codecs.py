"""Pixels of encoded pictures: one decoder for a format, on every machine of a run.

JPEG is libjpeg-turbo's (simplejpeg) with its exact inverse transform and smooth chroma, PNG is libpng's (imagecodecs):
both ship their library, so the pixels follow from the versions of the packages and not from the machine. Pillow's are
the same, at three times the time for JPEG and twice for PNG; it decodes what is neither plain nor whole to the fast
ones (palettes, transparency, other formats, recoverable damage), so it alone decides what cannot be decoded.
"""

import io
import struct
from typing import Any

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_GREY, _COLOUR = 0, 2  # colour types of PNG
_MOST_PIXELS = 2**26  # above this Pillow warns and refuses; the fast decoders would just allocate
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # Pillow would clip these to 8 bits: nearly white


def rgb(data: bytes, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """An image in colour, uint8 [H, W, 3].

    Args:
        data: PNG, JPEG or whatever Pillow reads; grey becomes colour, transparency is dropped.
        out: uint8 [H, W, 3], contiguous; takes the pixels, and is returned, where the image has its size.

    Raises:
        Exception: it cannot be decoded; Pillow raises whatever its codecs stumble over.
        ValueError: it has more than 8 bits a channel in grey: which of them count, the file does not say.
    """
    pixels = None
    if data.startswith(_JPEG):
        pixels = _fast_jpeg(data, out)
    elif _plain(data, (8,), _COLOUR):
        pixels = _fast_png(data, (*_size(data), 3), np.uint8, out)
    return _slow_rgb(data) if pixels is None else pixels


def ids(data: bytes) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The numbers in a PNG of 8 or 16 bits of grey, or the indices of a palette: uint8 or uint16 [H, W].

    Raises:
        Exception: it cannot be decoded, or holds no ids.
    """
    if _plain(data, (8, 16), _GREY):
        found = _fast_png(data, _size(data), np.uint16 if data[24] == 16 else np.uint8)
        if found is not None:
            return found
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("L", "P", "I;16"):
            raise ValueError(f"mode {image.mode} does not hold ids of 8 or 16 bits")
        return np.array(image)  # [H, W]


def _fast_jpeg(data: bytes, out: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("YCbCr", "Gray") or height * width > _MOST_PIXELS:
            return None
        if out is None or out.shape != (height, width, 3):
            out = np.empty((height, width, 3), dtype=np.uint8)
        simplejpeg.decode_jpeg(data, buffer=out)
    except ValueError:  # strict: a mere warning of the library is one
        return None
    return out


def _fast_png(data: bytes, shape: tuple[int, ...], dtype: Any, out: NDArray[Any] | None = None) -> NDArray[Any] | None:
    if out is None or out.shape != shape:
        out = np.empty(shape, dtype=dtype)
    try:
        imagecodecs.png_decode(data, out=out)
    except (RuntimeError, ValueError):  # PngError is a RuntimeError
        return None
    return out


def _plain(data: bytes, depths: tuple[int, ...], colour: int) -> bool:
    """A PNG of this kind, neither transparent nor animated, of a size that is no bomb."""
    if not data.startswith(_PNG) or len(data) < 33 or data[24] not in depths or data[25] != colour:
        return False
    height, width = _size(data)
    ahead = data[33 : data.find(b"IDAT")]
    return 0 < height * width <= _MOST_PIXELS and b"tRNS" not in ahead and b"acTL" not in ahead


def _size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", data, 16)
    return height, width


def _slow_rgb(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        if image.mode in _DEEP:
            raise ValueError(f"mode {image.mode} is grey of more than 8 bits; convert it to 8, or ingest it so")
        return np.array(image.convert("RGB"))  # [H, W, 3]
