"""A source of TFRecord files: plain files by record offsets, GZIP files as a stream."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from pipelines.errors import DataError
from pipelines.ingest.example import Feature, parse_example
from pipelines.ingest.picture import BadRecord, Picture
from pipelines.ingest.source import Record, file_stamp
from pipelines.ingest.tfrecord import Place, checked, is_compressed, places, read_at, stream


class Layout(Protocol):
    """What the features of an Example mean."""

    @property
    def format(self) -> str:
        """Name of the format."""
        ...

    def pictures(self, features: Mapping[str, Feature]) -> Iterator[Picture]:
        """The pictures of a record. Raises BadRecord."""
        ...

    def count(self, features: Mapping[str, Feature]) -> int:
        """How many pictures a record holds, without decoding them."""
        ...


@dataclass(frozen=True)
class Packed:
    """The records of GZIP files, one file after the other."""

    files: tuple[Path, ...]

    @property
    def stamp(self) -> str:
        return "; ".join(file_stamp(path) for path in self.files)

    def __iter__(self) -> Iterator[Record]:
        number = 0
        for path in self.files:
            for in_file, content in enumerate(stream(path)):
                yield Record(number, f"{path.name} record {in_file}", content)
                number += 1


@dataclass(frozen=True)
class Examples:
    """TFRecord files of tf.train.Examples, in the given order: all plain or all GZIP.

    Every record of a plain file is found by its headers first, so that shards are made side by side. A GZIP file can
    only be read from its beginning: see `Ingest.pieces`.
    """

    files: tuple[Path, ...]
    layout: Layout

    @property
    def format(self) -> str:
        return self.layout.format

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"files": [path.name for path in self.files]}

    def records(self) -> "Sequence[Record] | Packed":
        """
        Raises:
            DataError: some files are GZIP and some are not; a plain one is cut off or its headers are damaged.
        """
        packed = {is_compressed(path) for path in self.files}
        if packed == {True}:
            return Packed(self.files)
        if len(packed) > 1:
            raise DataError(f"{self.format}: some files are GZIP and some are not; ingest them one after the other")
        found: list[Record] = []
        for file, path in enumerate(self.files):
            stamp = file_stamp(path)
            for number, place in enumerate(places(path)):
                name = f"{path.name} record {number}"
                samples = found[0].samples if found else self._samples(path, place)
                found.append(Record(len(found), name, (file, place), f"{stamp} {place.offset}", samples))
        return found

    @contextmanager
    def reading(self) -> Iterator[Callable[[Any], Iterator[Picture]]]:
        with ExitStack() as stack:
            opened: dict[int, IO[bytes]] = {}

            def read(content: tuple[int, Place] | tuple[bytes, bytes]) -> Iterator[Picture]:
                first, second = content
                if isinstance(first, bytes):
                    assert isinstance(second, bytes)
                    data = checked(first, second)
                else:
                    assert isinstance(second, Place)
                    if first not in opened:
                        opened[first] = stack.enter_context(self.files[first].open("rb"))
                    data = read_at(opened[first], second)
                return self.layout.pictures(parse_example(data))

            yield read

    def _samples(self, path: Path, place: Place) -> int:
        """Of the first record, taken for all: it only decides how many records make a shard."""
        try:
            with path.open("rb") as file:
                return max(1, self.layout.count(parse_example(read_at(file, place))))
        except BadRecord:
            return 1
