"""Windows of a plan, read from a folder of shards through webdataset: sequential reads, and a verdict on each sample.

Permanent faults of content become `Fault`s, the same for every reader. Anything else that goes wrong while reading is
transient: it is tried again, then stops the run with the shard's name, and never changes a batch.
"""

import io
import logging
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from webdataset.tariterators import group_by_keys, tar_file_expander

from pipelines.errors import DataError
from pipelines.plan import Piece, Plan, Window
from pipelines.samples import IMAGE_MEMBERS, MASK_MEMBERS
from pipelines.shards import read_sidecar, scan, sha256_of

logger = logging.getLogger(__name__)

RETRY_SECONDS = (0.2, 1.0, 5.0)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a sample can never be used."""

    reason: str


@dataclass(frozen=True, slots=True)
class Raw:
    """A sample as it lies in its shard: bytes by member name."""

    key: str
    members: Mapping[str, bytes]


class Reader:
    """Holds the newest window of every open lane, undecoded.

    Args:
        plan: of the set in `folder`.
        folder: holds the shards.
        with_masks: read the masks too.
    """

    def __init__(self, plan: Plan, folder: Path, with_masks: bool) -> None:
        self._plan = plan
        self._folder = folder
        self._members = {*IMAGE_MEMBERS, "json", *(MASK_MEMBERS if with_masks else ())}
        self._windows: dict[int, tuple[Window, dict[int, Raw | Fault]]] = {}  # by lane
        self._checked: dict[int, Fault | None] = {}  # by shard: once found good or bad it stays so
        self._offsets: dict[int, tuple[int, ...]] = {}

    def window(self, window: Window) -> Mapping[int, Raw | Fault]:
        """Every sample of a window by its number in the set; it takes the place of its lane's window before."""
        held = self._windows.get(window.lane)
        if held is None or held[0] != window:
            self._windows.pop(window.lane, None)  # let go of the old one before the new one is read
            samples: dict[int, Raw | Fault] = {}
            for piece in self._plan.pieces(window):
                first = int(self._plan.index.offsets[piece.shard]) + piece.first
                samples.update(enumerate(self._piece(piece), start=first))
            held = self._windows[window.lane] = (window, samples)
        return held[1]

    def keep(self, lanes: set[int]) -> None:
        """Let go of the windows of all other lanes."""
        for lane in set(self._windows) - lanes:
            del self._windows[lane]

    def _piece(self, piece: Piece, attempt: int = 0) -> list[Raw | Fault]:
        """Exactly `last - first` samples or faults."""
        shard = self._plan.index.shards[piece.shard]
        path = self._folder / shard.name
        try:
            if piece.shard not in self._checked:
                self._checked[piece.shard] = fault = self._check(piece.shard)
                if fault:
                    logger.warning("%s: %s; its samples are replaced", path, fault.reason)
            fault = self._checked[piece.shard]
            samples: list[Raw | Fault] = (
                [fault] * (piece.last - piece.first) if fault else list(self._read(path, piece))
            )
        except OSError as error:
            if attempt < len(RETRY_SECONDS):  # it may be transient, and it never changes a batch
                logger.warning("%s: %s; trying again in %s s", path, error, RETRY_SECONDS[attempt])
                time.sleep(RETRY_SECONDS[attempt])
                return self._piece(piece, attempt + 1)
            raise DataError(f"{path}: cannot be read ({error}); repair the storage and start again") from error
        except (tarfile.TarError, ValueError) as error:
            raise DataError(f"{path}: does not match its offsets ({error}); index the folder again") from error
        if len(samples) != piece.last - piece.first:
            raise DataError(
                f"{path}: {len(samples)} samples in rows {piece.first} to {piece.last}; index the folder again"
            )
        return samples

    def _check(self, number: int) -> Fault | None:
        """Compare a shard with its index. It is read whole: a verdict must not depend on who reads which part."""
        shard = self._plan.index.shards[number]
        path = self._folder / shard.name
        try:
            size = path.stat().st_size
            if size != shard.bytes:
                return Fault(f"the shard has {size} bytes, its index says {shard.bytes}")
            if sha256_of(path) != shard.sha256:
                return Fault("the shard's checksum is not the one in its index")
        except FileNotFoundError:
            return Fault("the shard is not there")
        try:
            sidecar = read_sidecar(self._folder, shard.name)
            if sidecar.shard != shard:
                raise DataError(f"{shard.name}: its sidecar belongs to another shard")
            self._offsets[number] = sidecar.offsets
        except DataError as error:
            # Only a short cut is lost: the offsets follow from the tar, which is known to be good.
            logger.warning("%s; scanning the shard instead", error)
            sidecar = scan(path, shard.name)
            if sidecar.shard != shard:
                raise DataError(
                    f"{path}: {sidecar.shard.samples} samples, the index says {shard.samples}; index the folder again"
                ) from None
            self._offsets[number] = sidecar.offsets
        return None

    def _read(self, path: Path, piece: Piece) -> Iterator[Raw]:
        """The samples of a piece, by webdataset's own tar iteration and grouping."""
        offsets = self._offsets[piece.shard]
        with path.open("rb") as file:
            file.seek(offsets[piece.first])
            rows = file.read(offsets[piece.last] - offsets[piece.first])
        source = [{"url": str(path), "stream": io.BytesIO(rows)}]
        # No handler is given, so webdataset raises where it could skip. Unwanted members go after the grouping: without
        # any member a sample would vanish and shift the rows behind it.
        for sample in group_by_keys(tar_file_expander(source)):
            yield Raw(sample["__key__"], {name: data for name, data in sample.items() if name in self._members})
