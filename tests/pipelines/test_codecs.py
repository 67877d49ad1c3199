"""Fast codecs give Pillow's pixels and take no file that Pillow refuses."""

import io
import random
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipelines import codecs


def noise(mode: str, side: int = 24) -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (side, side + 3, 4), dtype=np.uint8)
    return Image.fromarray(pixels, mode="RGBA").convert(mode)


def smooth(side: int = 40) -> Image.Image:
    return noise("RGB", 5).resize((side + 1, side), Image.Resampling.BICUBIC)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def png_with(**options: object) -> bytes:
    extra = PngImagePlugin.PngInfo()
    extra.add_text("note", "tRNS")  # a word in a text is no chunk that matters: Pillow reads it then, to the same end
    return saved(noise("RGB"), "PNG", pnginfo=extra, **options)


FILES = {
    **{
        f"jpeg {sub} {quality}": saved(smooth(), "JPEG", subsampling=sub, quality=quality)
        for sub in (0, 1, 2)
        for quality in (40, 95)
    },
    "progressive jpeg": saved(smooth(), "JPEG", progressive=True, optimize=True),
    "jpeg of one pixel": saved(noise("RGB").crop((0, 0, 1, 1)), "JPEG"),
    "grey jpeg": saved(noise("L"), "JPEG"),
    "cmyk jpeg": saved(noise("CMYK"), "JPEG"),
    "rgb jpeg": saved(smooth(), "JPEG", keep_rgb=True),
    **{f"png {mode}": saved(noise(mode), "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1")},
    "transparent png": saved(noise("RGB"), "PNG", transparency=(1, 2, 3)),
    "png with a note": png_with(),
    "animated png": saved(noise("RGB"), "PNG", save_all=True, append_images=[smooth(24).resize((27, 24))]),
    "webp": saved(smooth(), "WEBP"),
    "gif": saved(noise("P"), "GIF"),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pillow(name: str) -> None:
    data = FILES[name]
    expected = pillow(data)
    assert np.array_equal(codecs.rgb(data), expected)
    out = np.zeros_like(expected)
    found = codecs.rgb(data, out)
    assert np.array_equal(found, expected)
    fast = name.startswith(("jpeg", "progressive", "grey")) or name == "png RGB"
    assert (found is out) == fast  # the plain ones are decoded in place
    small = np.zeros((2, 2, 3), dtype=np.uint8)
    assert np.array_equal(codecs.rgb(data, small), expected) and not small.any()


@pytest.mark.parametrize("name", ["jpeg 2 95", "png RGB", "png L"])
def test_damage_is_judged_as_pillow_judges_it(name: str) -> None:
    data, chance = FILES[name], random.Random(1)
    refused = 0
    for number in range(300):
        cut = chance.randrange(1, len(data))
        damaged = bytearray(data[:cut] if number % 3 == 0 else data)
        if number % 3:
            damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            expected = pillow(bytes(damaged))
        except Exception:
            refused += 1
            with pytest.raises(Exception):  # noqa: B017, PT011 whatever Pillow raises
                codecs.rgb(bytes(damaged))
        else:
            assert np.array_equal(codecs.rgb(bytes(damaged)), expected)
    assert refused > 90


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_ids_are_exact(dtype: type) -> None:
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (9, 7), dtype=dtype, endpoint=True)
    for options in ({}, {"interlace": 1}, {"compress_level": 0}):
        found = codecs.ids(saved(Image.fromarray(ids), "PNG", **options))
        assert found.dtype == dtype and np.array_equal(found, ids)


def test_indices_of_a_palette_are_ids_and_colours_are_not() -> None:
    image = noise("P")
    assert np.array_equal(codecs.ids(saved(image, "PNG")), np.asarray(image))
    for mode in ("RGB", "RGBA", "LA", "1"):
        with pytest.raises(ValueError, match=f"mode {mode} does not hold ids"):
            codecs.ids(saved(noise(mode), "PNG"))


def test_a_size_that_lies_takes_no_memory() -> None:
    bomb = bytearray(FILES["png RGB"])
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # 10 GB, had they to be laid out
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(Image.DecompressionBombError):
        codecs.rgb(bytes(bomb))
