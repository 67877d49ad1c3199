"""Where the files of a run lie: a folder on local or shared disk, or a prefix in object storage.

Every file is whole or not there, whatever dies while it is written.
"""

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import urlsplit

from orchestration.files import partial, write_bytes
from pipelines.object_stores import SCHEMES
from pipelines.sources import local_path, shown


@dataclass(frozen=True)
class File:
    """What a listing tells.

    Fields:
        name: below the folder that was listed, with slashes.
        modified: seconds by the storage's clock, to be compared with its own times alone.
    """

    name: str
    modified: float


class Storage(Protocol):
    """A folder of files. Names are relative to it, with slashes; a dot in front marks a file that is not whole.

    Whatever fails raises OSError; what is not there, FileNotFoundError.
    """

    @property
    def url(self) -> str:
        """An absolute path, or s3://bucket/prefix."""

    def __truediv__(self, name: str) -> "Storage":
        """A folder in it; it need not be there."""

    def files(self) -> list[File]:
        """All files below; none where there is no such folder."""

    def open(self, name: str) -> BinaryIO:
        """To be read from its beginning; of a file that is not replaced meanwhile."""

    def read(self, name: str) -> bytes:
        """The whole file, as it was or as it is if it is replaced meanwhile."""

    def write(self, name: str, *pieces: bytes | memoryview) -> None:
        """Makes a file of these pieces in place of the one before, at once and durably. Makes its folder too."""

    def claim(self, name: str, content: bytes) -> str | None:
        """Makes a file that only one of many can make; where storage cannot say who was first it adds a token to the
        name.

        Returns:
            the file's name; None: somebody else has it, or several wanted it and none of them has.
        """

    def touch(self, name: str, content: bytes) -> None:
        """Makes a file of this content newly modified."""

    def move(self, name: str, new: str) -> None:
        """Renames a file or a folder. On object storage, where that is a copy, death in the middle leaves both."""

    def delete(self, name: str) -> None:
        """Removes a file or a folder; nothing if it is not there."""

    def now(self) -> float:
        """The time by the storage's clock."""


def storage_at(where: str | Path) -> Storage:
    """The folder at a path, s3:// or gs:// address. It need not be there.

    Raises:
        ValueError: the address is of another kind, or holds credentials.
    """
    from orchestration.runs.object_storage import ObjectStorage

    address = str(where)
    path = local_path(address)
    if path is not None:
        return LocalStorage(path.expanduser().absolute())
    parts = urlsplit(address)
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise ValueError(
            f"{shown(address)} is no place for runs; write a path, s3://bucket/prefix or gs://bucket/prefix"
        )
    if "@" in parts.netloc or parts.query:
        raise ValueError(
            f"{shown(address)}: credentials and options do not belong in an address; set AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, or GOOGLE_APPLICATION_CREDENTIALS, in the environment"
        )
    return ObjectStorage(address)


def read_json(storage: Storage, name: str) -> Any:
    """Raises: ValueError: the file is not JSON."""
    return json.loads(storage.read(name))


def to_json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode()


@dataclass(frozen=True)
class LocalStorage:
    """A folder of this machine, or of a disk that machines share."""

    path: Path

    @property
    def url(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> "LocalStorage":
        return LocalStorage(self.path / name)

    def files(self) -> list[File]:
        found = []
        for folder, _, names in os.walk(self.path):
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                    found.append(File(path.relative_to(self.path).as_posix(), path.stat().st_mtime))
        return found

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, *pieces: bytes | memoryview) -> None:
        write_bytes(self.path / name, *pieces)

    def claim(self, name: str, content: bytes) -> str | None:
        """The file system lets one alone make the file, also over NFS, whose listings may be old."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("xb") as file:
                file.write(content)
        except FileExistsError:
            return None
        return name

    def touch(self, name: str, content: bytes) -> None:
        os.utime(self.path / name)  # writes nothing: it works on a full disk

    def move(self, name: str, new: str) -> None:
        (self.path / new).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).rename(self.path / new)

    def delete(self, name: str) -> None:
        path = self.path / name
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def now(self) -> float:
        self.path.mkdir(parents=True, exist_ok=True)
        with partial(self.path) as probe:
            probe.touch()
            return probe.stat().st_mtime
