"""What a data set in somebody's format is: records, and a reader that makes them into pictures."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipelines.ingest.picture import Picture

Reader = Callable[[Any], Iterable[Picture]]
"""Makes a record's content into pictures."""


@dataclass(frozen=True)
class Record:
    """What is taken or left as a whole: an image file, a scene, a video.

    Fields:
        number: its place in the source.
        name: names it to people: a file's path, a file's name and a record's number.
        content: what the source's reader needs; picklable.
        stamp: changes whenever the record does.
        samples: how many samples it holds.
    """

    number: int
    name: str
    content: Any
    stamp: str = ""
    samples: int = 1


class Unseen(Protocol):
    """Records of which nothing is known before they are read from the beginning. Picklable."""

    @property
    def stamp(self) -> str:
        """Changes whenever the files do."""
        ...

    def __iter__(self) -> Iterator[Record]:
        """The records in order; DataError where the file ends early or is damaged."""
        ...


class Source(Protocol):
    """A data set in somebody's format. Picklable; the same files give the same records in the same order."""

    @property
    def format(self) -> str:
        """Name of the format."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What else tells how the records are read (JSON), for the index; file names, but no folders."""
        ...

    def records(self) -> "Sequence[Record] | Unseen":
        """Every record in order, or what reads them one after the other.

        Raises:
            DataError: there is nothing to read, or the files do not hold together.
        """
        ...

    def reading(self) -> AbstractContextManager[Reader]:
        """Opens what is needed; the function in it makes a record's content into pictures.

        It raises BadRecord, or any error of its codecs, where the record cannot be used.
        """
        ...


def file_stamp(path: Path) -> str:
    """Changes when a file does: its name, size and time of change."""
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"
