"""What comes in: the same pixels as Pillow's, the square in the middle, and nothing unpacked that is too large."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from served import photo

from orchestration.serving.images import ImageError, TooLargeError, decoded, framed, from_arrays


def encoded(pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]", format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it has this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_pillows_upright(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(1, 30, 50), format, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(decoded(data, 1500), expected)


def test_grey_palettes_and_transparency_become_colour() -> None:
    grey = photo(2)[:, :, 0]
    np.testing.assert_array_equal(decoded(encoded(grey), 400), np.repeat(grey[:, :, None], 3, axis=2))
    with_alpha = np.dstack([photo(2), np.full((20, 20), 9, np.uint8)])
    np.testing.assert_array_equal(decoded(encoded(with_alpha), 400), photo(2))


@given(height=st.integers(1, 70), width=st.integers(1, 70), side=st.sampled_from([8, 20]))
def test_what_is_seen_is_the_square_in_the_middle(height: int, width: int, side: int) -> None:
    image = photo(3, height, width)
    seen = framed(image, side)
    left, top, right, bottom = seen.box
    assert right - left == bottom - top == min(height, width)
    assert abs(left - (width - right)) <= 1 and abs(top - (height - bottom)) <= 1
    assert seen.pixels.shape == (side, side, 3)
    square = Image.fromarray(image).crop(seen.box).resize((side, side), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(seen.pixels, np.asarray(square))


@pytest.mark.parametrize("side", [20_000, 2**31 - 1])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(TooLargeError, match="over the limit of"):
        decoded(bomb(side, side), 2**25)


def test_the_limit_is_on_pixels() -> None:
    assert decoded(encoded(photo(1, 30, 50)), 1500).shape == (30, 50, 3)
    with pytest.raises(TooLargeError, match="50x30 is over the limit of 1499 pixels"):
        decoded(encoded(photo(1, 30, 50)), 1499)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image",
        encoded(photo(1))[:60],
        encoded(photo(1), "JPEG")[:100],
        encoded(photo(1), "GIF"),
        bomb(100, 100),
    ],
    ids=["empty", "text", "cut PNG", "cut JPEG", "another format", "too few pixels"],
)
def test_what_is_no_image_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decoded(data, 10**6)
    assert not isinstance(caught.value, TooLargeError)


def test_grey_of_16_bits_is_refused_by_name() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)).save(buffer, format="PNG")
    with pytest.raises(ImageError, match="more than 8 bits"):
        decoded(buffer.getvalue(), 400)


def test_arrays() -> None:
    images = np.stack([photo(1), photo(2)])
    np.testing.assert_array_equal(from_arrays(images.tolist()), images)
    wrong = [[], [[[1, 2, 3]]], images[..., :2].tolist(), [[[[1, 2, 3]], [[1, 2]]]], [[[[0.5, 0, 0]]]], "text", None]
    for values in [*wrong, [[[[0, 0, 256]]]], [[[[0, -1, 0]]]], [[[[2**70, 0, 0]]]]]:
        with pytest.raises(ImageError):
            from_arrays(values)
