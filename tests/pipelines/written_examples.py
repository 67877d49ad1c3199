"""TFRecord files written by others' code: the tfrecord package frames and checks, protobuf encodes."""

import gzip
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image
from tfrecord.writer import TFRecordWriter

Values = tuple[list[Any], str]
"""A feature: its values, and `byte`, `float` or `int`."""


def example(features: Mapping[str, Values]) -> bytes:
    """A tf.train.Example by the tfrecord package."""
    return bytes(TFRecordWriter.serialize_tf_example(dict(features)))


def framed(records: Iterable[bytes]) -> bytes:
    """Records as they stand in a TFRecord file."""
    file = bytearray()
    for record in records:
        length = len(record).to_bytes(8, "little")
        file += length + TFRecordWriter.masked_crc(length) + record + TFRecordWriter.masked_crc(record)
    return bytes(file)


def write(path: Path, records: Iterable[bytes], packed: bool) -> Path:
    """A TFRecord file, GZIP or not."""
    data = framed(records)
    path.write_bytes(gzip.compress(data, 6) if packed else data)
    return path


def one_byte(values: np.ndarray) -> Values:
    """uint8 of any shape as DeepMind's sets hold it: a string for each element."""
    return [bytes([value]) for value in values.astype(np.uint8).ravel().tolist()], "byte"


def floats(values: Any) -> Values:
    return np.asarray(values, dtype=np.float64).ravel().tolist(), "float"


def integers(values: Any) -> Values:
    return np.asarray(values, dtype=np.int64).ravel().tolist(), "int"


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def unpacked_lists() -> Any:
    """A message class like tf.train.Example whose numbers are not packed, as writers of protobuf 2 make them."""
    file = descriptor_pb2.FileDescriptorProto(name="unpacked.proto", package="unpacked", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> Any:
        made = file.message_type.add(name=name)
        for field, number, label, kind, of in fields:
            made.field.add(name=field, number=number, label=label, type=kind, type_name=of or None)
        return made

    repeated, one = kinds.LABEL_REPEATED, kinds.LABEL_OPTIONAL
    message("BytesList", ("value", 1, repeated, kinds.TYPE_BYTES, ""))
    message("FloatList", ("value", 1, repeated, kinds.TYPE_FLOAT, ""))
    message("Int64List", ("value", 1, repeated, kinds.TYPE_INT64, ""))
    message(
        "Feature",
        ("bytes_list", 1, one, kinds.TYPE_MESSAGE, ".unpacked.BytesList"),
        ("float_list", 2, one, kinds.TYPE_MESSAGE, ".unpacked.FloatList"),
        ("int64_list", 3, one, kinds.TYPE_MESSAGE, ".unpacked.Int64List"),
        ("later", 9, one, kinds.TYPE_FIXED64, ""),  # a field that nobody knows yet
    )
    message("Entry", ("key", 1, one, kinds.TYPE_STRING, ""), ("value", 2, one, kinds.TYPE_MESSAGE, ".unpacked.Feature"))
    message("Features", ("feature", 1, repeated, kinds.TYPE_MESSAGE, ".unpacked.Entry"))
    message("Example", ("features", 1, one, kinds.TYPE_MESSAGE, ".unpacked.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("unpacked.Example"))
