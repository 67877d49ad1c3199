"""TFRecord files and Examples as other code writes them; every damage named."""

import gzip
import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_examples import example, framed, one_byte, unpacked_lists, write

from pipelines.errors import DataError
from pipelines.ingest import BadRecord
from pipelines.ingest.example import parse_example, required
from pipelines.ingest.movi import tfrecord_files
from pipelines.ingest.tfrecord import checked, masked_crc, places, read_at, stream

RECORDS = st.lists(st.binary(max_size=200), max_size=6)
INT64 = st.integers(-(2**63), 2**63 - 1)
HUGE = struct.pack("<QI", 2**40, masked_crc(struct.pack("<Q", 2**40)))
FLOAT32 = st.floats(width=32, allow_nan=False)


def read_plain(path: Path) -> list[bytes]:
    with path.open("rb") as file:
        return [read_at(file, place) for place in places(path)]


def read_packed(path: Path) -> list[bytes]:
    return [checked(data, crc) for data, crc in stream(path)]


@given(st.binary(max_size=300))
def test_the_checksum_is_the_masked_crc32c(data: bytes) -> None:
    crc = crc32c.crc32c(data)
    assert masked_crc(data) == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_the_checksum_of_the_standard() -> None:
    assert masked_crc(bytes(32)) == ((0x8A9136AA >> 15 | 0x8A9136AA << 17) + 0xA282EAD8) % 2**32  # RFC 3720, B.4


@settings(deadline=None, max_examples=30)
@given(records=RECORDS)
def test_records_come_back_plain_and_packed(tmp_path_factory: pytest.TempPathFactory, records: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("r")
    assert read_plain(write(folder / "plain", records, packed=False)) == records
    assert read_packed(write(folder / "packed", records, packed=True)) == records


def test_gzip_files_strung_together_are_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gzip.compress(framed([b"a", b"bc"])) + gzip.compress(framed([b"d"])))
    assert read_packed(tmp_path / "a") == [b"a", b"bc", b"d"]


def test_unpacking_holds_little_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [bytes(2**20)] * 64, packed=True)  # 64 MiB in about 64 KiB
    assert path.stat().st_size < 2**17
    tracemalloc.start()
    assert sum(len(data) for data, _ in stream(path)) == 64 * 2**20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def damaged(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda data: damaged(data, 16 + 5 + 2), "record 1: its length does not match"),
        (lambda data: damaged(data, 16 + 5 + 9), "record 1: its length does not match"),
        (lambda data: data[:-1], "cut off in record 2"),
        (lambda data: data[: 2 * (16 + 5) + 7], "cut off in record 2"),
        (lambda data: b"no records at all, but text", "record 0: its length does not match"),
        (
            lambda data: data + struct.pack("<QI", 2**40, masked_crc(struct.pack("<Q", 2**40))),
            "record 3: 1099511627776",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, packed: bool, cut: Any, message: str) -> None:
    data = cut(framed([b"abcde"] * 3))
    (tmp_path / "set.tfrecord").write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(DataError, match=rf"^set\.tfrecord: {message}"):
        (read_packed if packed else read_plain)(tmp_path / "set.tfrecord")


@pytest.mark.parametrize("keep", [5, 30, -9, -1])
def test_gzip_that_ends_early_is_named(tmp_path: Path, keep: int) -> None:
    records = [np.random.default_rng(row).bytes(50) for row in range(4)]
    data = write(tmp_path / "a.tfrecords", records, packed=True).read_bytes()
    (tmp_path / "a.tfrecords").write_bytes(data[:keep])
    with pytest.raises(DataError, match=r"a\.tfrecords: (record \d|cut off)"):
        read_packed(tmp_path / "a.tfrecords")


def test_gzip_with_a_wrong_checksum_is_named(tmp_path: Path) -> None:
    data = write(tmp_path / "a.tfrecords", [b"abc"], packed=True).read_bytes()
    (tmp_path / "a.tfrecords").write_bytes(damaged(data, len(data) - 6))
    with pytest.raises(DataError, match="GZIP"):
        read_packed(tmp_path / "a.tfrecords")


def test_damaged_data_costs_one_record(tmp_path: Path) -> None:
    for packed in (False, True):
        data = damaged(framed([b"abcde"] * 3), 12 + 16 + 5 + 2)  # in the data of record 1
        path = tmp_path / "a"
        path.write_bytes(gzip.compress(data) if packed else data)
        results = []
        with path.open("rb") as file:
            contents = list(stream(path)) if packed else places(path)
            for content in contents:
                try:
                    results.append(checked(*content) if packed else read_at(file, content))  # type: ignore[misc,arg-type]
                except BadRecord as error:
                    results.append(str(error).encode())
        assert results == [b"abcde", b"its checksum does not match its data", b"abcde"]


# --- tf.train.Example --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    strings=st.lists(st.binary(max_size=300), min_size=1, max_size=5),
    floats=st.lists(FLOAT32, min_size=1, max_size=5),
    integers=st.lists(INT64, min_size=1, max_size=5),
    name=st.text(max_size=10),
)
def test_features_come_back(strings: list[bytes], floats: list[float], integers: list[int], name: str) -> None:
    features = parse_example(
        example({name + "s": (strings, "byte"), name + "f": (floats, "float"), name + "i": (integers, "int")})
    )
    assert set(features) == {name + "s", name + "f", name + "i"}
    assert features[name + "s"].strings() == strings
    assert features[name + "f"].floats().tolist() == floats and features[name + "f"].floats().dtype == np.float32
    assert features[name + "i"].integers().tolist() == integers


@given(floats=st.lists(FLOAT32, max_size=5), integers=st.lists(INT64, max_size=5), cut=st.integers(0, 5))
def test_numbers_need_not_be_packed(floats: list[float], integers: list[int], cut: int) -> None:
    message = unpacked_lists()()
    first = message.features.feature.add(key="f")
    first.value.float_list.value.extend(floats)
    first.value.float_list.SetInParent()
    first.value.later = 7
    second = message.features.feature.add(key="i")
    second.value.int64_list.value.extend(integers[:cut])
    second.value.int64_list.SetInParent()
    whole = message.SerializeToString()
    assert parse_example(whole)["f"].floats().tolist() == floats
    assert parse_example(whole)["i"].integers().tolist() == integers[:cut]
    more = unpacked_lists()()
    more.features.feature.add(key="i").value.int64_list.value.extend([1, *integers[cut:]])
    both = parse_example(whole + more.SerializeToString())  # messages strung together are merged; the last entry counts
    assert both["i"].integers().tolist() == [1, *integers[cut:]] and both["f"].floats().tolist() == floats


@given(st.lists(st.integers(0, 255), max_size=50))
def test_one_byte_strings_become_an_array(values: list[int]) -> None:
    feature = parse_example(example({"image": one_byte(np.array(values))}))["image"]
    assert feature.bytes_array().tolist() == values and feature.bytes_array().dtype == np.uint8


def test_a_whole_string_becomes_an_array_too() -> None:
    assert parse_example(example({"a": ([b"\x0a\x01xyz"], "byte")}))["a"].bytes_array().tolist() == list(b"\x0a\x01xyz")
    with pytest.raises(BadRecord, match="one byte each"):
        parse_example(example({"a": ([b"ab", b"c"], "byte")}))["a"].bytes_array()


def test_a_feature_of_another_kind_is_named() -> None:
    features = parse_example(example({"x": ([1.5], "float"), "y": ([1], "int")}))
    with pytest.raises(BadRecord, match="feature x: it holds floats, not bytes"):
        features["x"].strings()
    with pytest.raises(BadRecord, match="feature y: it holds integers, not floats"):
        features["y"].floats()
    with pytest.raises(BadRecord, match=r"no feature z \(it has x, y\)"):
        required(features, "z")
    assert features["x"].numbers().tolist() == [1.5] and features["y"].numbers().tolist() == [1]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_messages_are_bad_records_and_nothing_else(data: st.DataObject) -> None:
    whole = bytearray(example({"a": ([b"xy", b"z"], "byte"), "b": ([1.0, math.pi], "float"), "c": ([-1, 5], "int")}))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        for feature in parse_example(cut).values():
            feature.numbers()
            if feature.kind == "bytes":
                feature.strings()
    except BadRecord:
        pass


# --- which files are meant ---------------------------------------------------------------------------------------


def test_files_of_one_set_are_found(tmp_path: Path) -> None:
    names = [f"movi_c-train.tfrecord-{i:05d}-of-00012" for i in range(12)]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in tfrecord_files(tmp_path)] == names
    (tmp_path / "movi_c-validation.tfrecord-00000-of-00001").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 sets \(movi_c-train, movi_c-validation\); name one: .*movi_c-train"):
        tfrecord_files(tmp_path)
    assert [path.name for path in tfrecord_files(tmp_path / "movi_c-train")] == names
    assert len(tfrecord_files(tmp_path / "movi_c-validation.tfrecord-00000-of-00001")) == 1
    (tmp_path / names[7]).unlink()
    with pytest.raises(DataError, match=r"1 of 00012 files are missing, the first is movi_c-train.tfrecord-00007"):
        tfrecord_files(tmp_path / "movi_c-train")
    with pytest.raises(DataError, match=r"no \.tfrecord files"):
        tfrecord_files(tmp_path / "nothing")
