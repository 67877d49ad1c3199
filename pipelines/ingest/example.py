"""tf.train.Example, read from its protobuf wire format (https://protobuf.dev/programming-guides/encoding).

    Example  { Features features = 1; }
    Features { map<string, Feature> feature = 1; }
    Feature  { oneof { BytesList = 1; FloatList = 2; Int64List = 3; } }      each: repeated value = 1

Image sets hold a list of a million one-byte strings for an image: such a list is read by numpy at once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.ingest.picture import BadRecord

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_KINDS = {1: "bytes", 2: "floats", 3: "integers"}


@dataclass(frozen=True)
class Feature:
    """One feature, not yet taken apart.

    Fields:
        name: for messages.
        kind: `bytes`, `floats`, `integers`, or empty where nothing is set.
        payload: the list's own message.
    """

    name: str
    kind: str
    payload: memoryview

    def strings(self) -> list[bytes]:
        """The values of a BytesList."""
        self._must_be("bytes")
        return [bytes(value) for value in self._values(_BYTES)]

    def bytes_array(self) -> NDArray[np.uint8]:
        """A BytesList of one-byte strings, or of a single string, as uint8 [N]."""
        self._must_be("bytes")
        raw = np.frombuffer(self.payload, dtype=np.uint8)
        if len(raw) % 3 == 0:
            triples = raw.reshape(-1, 3)  # [N, (tag of field 1 as bytes, length 1, the byte)]
            if (triples[:, 0] == 0x0A).all() and (triples[:, 1] == 1).all():
                return triples[:, 2]
        values = self.strings()
        if len(values) > 1 and any(len(value) != 1 for value in values):
            raise BadRecord(f"feature {self.name}: its strings are not of one byte each")
        return np.frombuffer(b"".join(values), dtype=np.uint8)

    def floats(self) -> NDArray[np.float32]:
        """The values of a FloatList, packed or not, as float32 [N]."""
        self._must_be("floats")
        parts = [value for _, value in self._packable(_FIXED32)]
        if any(len(part) % 4 for part in parts):
            raise BadRecord(f"feature {self.name}: its floats are not of four bytes")
        return np.frombuffer(b"".join(parts), dtype="<f4").astype(np.float32)

    def integers(self) -> NDArray[np.int64]:
        """The values of an Int64List, packed or not, as int64 [N]."""
        self._must_be("integers")
        values: list[int] = []
        for wire, value in self._packable(_VARINT):
            position = 0
            while position < len(value):
                number, position = _varint(value, position)
                values.append(number - 2**64 if number >= 2**63 else number)
                if wire == _VARINT:
                    break
        return np.array(values, dtype=np.int64)

    def numbers(self) -> NDArray[np.float32] | NDArray[np.int64] | NDArray[np.uint8]:
        """The values, whatever their kind; strings must be of one byte each. [N]"""
        if self.kind == "floats":
            return self.floats()
        return self.integers() if self.kind == "integers" else self.bytes_array()

    def _must_be(self, kind: str) -> None:
        if self.kind not in (kind, ""):
            raise BadRecord(f"feature {self.name}: it holds {self.kind}, not {kind}")

    def _values(self, wanted: int) -> Iterator[memoryview]:
        for number, wire, value in _fields(self.payload):
            if number == 1:
                if wire != wanted:
                    raise BadRecord(f"feature {self.name}: wire type {wire} in its list")
                yield value

    def _packable(self, single: int) -> Iterator[tuple[int, memoryview]]:
        for number, wire, value in _fields(self.payload):
            if number == 1:
                if wire not in (single, _BYTES):
                    raise BadRecord(f"feature {self.name}: wire type {wire} in its list")
                yield wire, value


def parse_example(data: bytes) -> dict[str, Feature]:
    """The features of a serialized tf.train.Example by name.

    Raises:
        BadRecord: it is not one.
    """
    features: dict[str, Feature] = {}
    for number, wire, message in _fields(memoryview(data)):
        if number != 1:
            continue
        _expect(wire, _BYTES, "features")
        for entry, entry_wire, value in _fields(message):
            if entry == 1:
                _expect(entry_wire, _BYTES, "a feature")
                feature = _entry(value)
                features[feature.name] = feature  # of one name the last counts
    return features


def required(features: Mapping[str, Feature], name: str) -> Feature:
    """A feature that must be there. Raises BadRecord."""
    if name not in features:
        raise BadRecord(f"it has no feature {name} (it has {', '.join(sorted(features)) or 'none'})")
    return features[name]


def _entry(data: memoryview) -> Feature:
    name = ""
    parts: list[memoryview] = []
    for number, wire, value in _fields(data):
        if number in (1, 2):
            _expect(wire, _BYTES, "a feature")
        if number == 1:
            name = _text(value)
        elif number == 2:
            parts.append(value)
    # A message in pieces means the pieces one after the other.
    message = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
    kind = ""
    lists: list[memoryview] = []
    for number, wire, value in _fields(message):
        if number in _KINDS:
            _expect(wire, _BYTES, name)
            if _KINDS[number] != kind:  # one of three: the last kind counts
                kind, lists = _KINDS[number], []
            lists.append(value)
    return Feature(name, kind, lists[0] if len(lists) == 1 else memoryview(b"".join(lists)))


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """(field number, wire type, value) of each field of a message; a varint's value is its bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        begin = position
        if wire == _VARINT:
            _, position = _varint(data, position)
        elif wire == _BYTES:
            length, begin = _varint(data, position)
            position = begin + length
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        else:
            raise BadRecord(f"it is not a tf.train.Example (wire type {wire} at byte {begin})")
        if number == 0 or position > len(data):
            raise BadRecord(f"it is not a tf.train.Example (field {number} ends behind the message)")
        yield number, wire, data[begin:position]


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """(value, position behind it); 64 bits at most."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
    raise BadRecord("it is not a tf.train.Example (a number does not end)")


def _expect(wire: int, wanted: int, what: str) -> None:
    if wire != wanted:
        raise BadRecord(f"it is not a tf.train.Example (wire type {wire} for {what})")


def _text(value: memoryview) -> str:
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"it is not a tf.train.Example (a name is no UTF-8: {error})") from error
