"""Plain tars are read as webdataset reads them; whatever else is in a tar is left to it."""

import io
import tarfile
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipelines.tars import rows

NAMES = st.text("abz_01-", min_size=1, max_size=12).filter(lambda name: not name.startswith("__"))
SUFFIXES = st.sampled_from(["png", "image.PNG", "masks.npy", "json", "a.b.c"])


def tar_of(members: Sequence[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> tuple[bytes, list[int]]:
    """A tar without its end, and where each member begins."""
    buffer, begins = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1
            begins.append(tar.offset)
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    return buffer.getvalue()[:end], [*begins, end]


def by_webdataset(content: bytes) -> list[tuple[str, dict[str, bytes]]]:
    found = group_by_keys(tar_file_expander([{"url": "x", "stream": io.BytesIO(content)}]))
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in found]


@settings(max_examples=60, deadline=None)
@given(
    samples=st.lists(
        st.tuples(NAMES, st.dictionaries(SUFFIXES, st.binary(max_size=1100), min_size=1, max_size=4)),
        min_size=1,
        max_size=6,
        unique_by=lambda sample: sample[0],
    ),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_plain_rows_are_webdatasets(samples: list[tuple[str, dict[str, bytes]]], format: int) -> None:
    members = [(f"{key}.{suffix}", data) for key, parts in samples for suffix, data in parts.items()]
    content, begins = tar_of(members, format)
    firsts = [sum(len(parts) for _, parts in samples[:i]) for i in range(len(samples) + 1)]
    offsets = [begins[first] for first in firsts]
    expected = by_webdataset(content)
    everything = {suffix.lower() for _, parts in samples for suffix in parts}
    assert rows(content, offsets, everything) == expected
    some = {"png", "json"}
    assert rows(content, offsets, some) == [(k, {n: d for n, d in m.items() if n in some}) for k, m in expected]


@pytest.mark.parametrize(
    "members",
    [
        [("folder/a.png", b"1")],
        [("a" * 99 + ".png", b"1")],
        [("ä.png", b"1")],
        [("noextension", b"1")],
        [("__meta__.png", b"1")],
        [("a.png", b"1"), ("b.png", b"2")],
        [("a.png", b"1"), ("a.PNG", b"2")],
        [("a.other", b"1"), ("a.other", b"2")],
        [(".png", b"1")],
    ],
)
def test_what_is_not_plain_is_not_read(members: list[tuple[str, bytes]]) -> None:
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        content, begins = tar_of(members, format)
        assert rows(content, [0, begins[-1]], {"png"}) is None


def test_offsets_that_do_not_fit_are_not_read() -> None:
    content, begins = tar_of([("a.png", b"1" * 600), ("b.png", b"2")])
    assert rows(content, begins, {"png"}) is not None
    for offsets in ([512, *begins[1:]], [0, 512, begins[2]], [0, begins[1], begins[2] + 512], [0, begins[2]]):
        assert rows(content, offsets, {"png"}) is None
    assert rows(content[:-600], begins, {"png"}) is None
    link, (first, last) = tar_of([("a.png", b"")])
    other = bytearray(link)
    other[156] = ord("2")
    assert rows(bytes(other), [first, last], {"png"}) is None
    assert rows(content, [0, begins[1], begins[1]], {"png"}) is None  # an empty row
    same, begins = tar_of([("a.png", b"1"), ("a.json", b"2")])
    assert rows(same, begins, {"png"}) is None  # webdataset would make one sample of the two
