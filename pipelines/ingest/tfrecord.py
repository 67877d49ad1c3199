"""TFRecord files: framing with checksums, plain or GZIP, read without TensorFlow.

A record is  length (uint64) | CRC of length (uint32) | data | CRC of data (uint32), little endian, where the CRCs are
CRC32C, rotated and offset ("masked"), as TensorFlow's `record_writer` writes them. A wrong CRC of data damages one
record; a wrong length ends the file, since nothing behind it can be found.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from pipelines.errors import DataError
from pipelines.ingest.picture import BadRecord

_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_CHUNK = 2**18
_LARGEST = 2**30
"""No record of a published set comes near it; a larger one would be held in memory for nothing."""


@dataclass(frozen=True)
class Place:
    """Where a record's data lies in a plain file."""

    offset: int
    length: int


def is_compressed(path: Path) -> bool:
    """Whether a file is GZIP. Raises DataError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); name a TFRecord file") from error


def places(path: Path) -> list[Place]:
    """Every record of a plain file, found by its headers alone.

    Raises:
        DataError: a header is damaged, or the file is cut off.
    """
    found: list[Place] = []
    size = path.stat().st_size
    with path.open("rb") as file:
        while length := _length(file, path.name, len(found)):
            place = Place(file.tell(), length[0])
            if place.offset + place.length + _CRC.size > size:
                raise _cut_off(path.name, len(found))
            file.seek(place.length + _CRC.size, 1)
            found.append(place)
    return found


def read_at(file: IO[bytes], place: Place) -> bytes:
    """The data of a record of a plain file, checked.

    Raises:
        BadRecord: it does not match its checksum.
    """
    file.seek(place.offset)
    return checked(file.read(place.length), file.read(_CRC.size))


def stream(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """(data, CRC) of every record of a GZIP file, unpacked as it is read: memory is one record.

    Raises:
        DataError: a header is damaged, or the file is cut off or no GZIP.
    """
    with path.open("rb") as packed:
        file = _Unpacked(packed)
        number = 0
        try:
            while length := _length(file, path.name, number):
                data, crc = file.read(length[0]), file.read(_CRC.size)
                if len(crc) < _CRC.size:
                    raise _cut_off(path.name, number)
                yield data, crc
                number += 1
        except (zlib.error, EOFError) as error:
            raise DataError(
                f"{path.name}: record {number}: GZIP ends or is damaged ({error}); copy it again"
            ) from error


def checked(data: bytes, crc: bytes) -> bytes:
    """The data of a record, if it matches its masked CRC32C.

    Raises:
        BadRecord: it does not.
    """
    if len(crc) != _CRC.size or _CRC.unpack(crc)[0] != masked_crc(data):
        raise BadRecord("its checksum does not match its data")
    return data


def masked_crc(data: bytes) -> int:
    """CRC32C, rotated right by 15 bits, plus a constant: uint32.

    Raises:
        DataError: the library is not installed.
    """
    try:
        from google_crc32c import value
    except ImportError:
        raise DataError("TFRecord files need google-crc32c; pip install 'slotforge[ingest]'") from None
    crc = int(value(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _length(file: _Readable, name: str, number: int) -> tuple[int] | None:
    """Length of the next record's data; None at the end of the file."""
    header = file.read(_HEADER.size)
    if not header:
        return None
    if len(header) < _HEADER.size:
        raise _cut_off(name, number)
    length, crc = _HEADER.unpack(header)
    if crc != masked_crc(header[:8]):
        raise DataError(
            f"{name}: record {number}: its length does not match its checksum, so nothing behind it can be found; "
            "copy the file again, or name a TFRecord file"
        )
    if length > _LARGEST:
        raise DataError(f"{name}: record {number}: {length} bytes are more than a record may have ({_LARGEST})")
    return (length,)


def _cut_off(name: str, number: int) -> DataError:
    return DataError(f"{name}: cut off in record {number}; copy the file again")


class _Unpacked:
    """What a GZIP file holds, read forwards."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._unpack = zlib.decompressobj(wbits=31)
        self._ready = bytearray()
        self._taken = 0  # bytes at the front of `_ready` that are gone

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes, or what is left."""
        while len(self._ready) - self._taken < size and self._more():
            pass
        part = bytes(memoryview(self._ready)[self._taken : self._taken + size])
        self._taken += len(part)
        return part

    def _more(self) -> bool:
        if self._taken > _CHUNK or self._taken == len(self._ready):
            del self._ready[: self._taken]
            self._taken = 0
        packed = self._unpack.unconsumed_tail or self._unpack.unused_data or self._packed.read(_CHUNK)
        if self._unpack.eof:
            if not packed:
                return False
            self._unpack = zlib.decompressobj(wbits=31)  # GZIP files may be strung together
        if not packed:
            raise EOFError("it is cut off")
        # A limit on what comes out: a few packed bytes may stand for gigabytes.
        self._ready += self._unpack.decompress(packed, 4 * _CHUNK)
        return True
