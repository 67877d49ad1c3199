"""HDF5 in the multi-object layout of addtt's object-centric library.

Datasets `image` uint8 [N, H, W, 3], `mask` integers [N, H, W, 1] (0 is background), and factors. A factor [N, K, ...]
has K entries a scene, entry i for id i (entry 0 is the background's). With `visibility` [N, K] the visible entities
decide: the i-th visible one above 0 has label i, and `num_objects` counts them; without, those in view are counted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import DataError
from pipelines.ingest.picture import BadRecord, Picture
from pipelines.ingest.source import Record, file_stamp


@dataclass(frozen=True)
class Hdf5:
    """The scenes of one HDF5 file. Datasets that lie in other files are refused."""

    path: Path

    @property
    def format(self) -> str:
        return "hdf5"

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"files": [self.path.name]}

    def records(self) -> Sequence[Record]:
        """
        Raises:
            DataError: h5py is missing, or the file has another layout.
        """
        with self._opened() as datasets:
            count = len(datasets["image"])
        stamp = file_stamp(self.path)
        return [Record(row, f"{self.path.name} row {row}", row, stamp) for row in range(count)]

    @contextmanager
    def reading(self) -> Iterator[Callable[[Any], Iterator[Picture]]]:
        with self._opened() as datasets:
            yield lambda row: _scene(datasets, row)

    @contextmanager
    def _opened(self) -> Iterator[dict[str, Any]]:
        try:
            import h5py
        except ImportError:
            raise DataError("HDF5 needs h5py; pip install 'slotforge[ingest]'") from None
        try:
            file = h5py.File(self.path, "r")
        except OSError as error:
            raise DataError(f"{self.path}: no HDF5 file that can be read ({error}); name one") from error
        with file:
            yield self._checked(file, h5py)

    def _checked(self, file: Any, h5py: Any) -> dict[str, Any]:
        datasets = {}
        for name in file:
            # A link or a virtual dataset would read other files of whoever opens this one.
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise DataError(f"{self.path}: {name} is a link to elsewhere; copy the data into the file")
            if isinstance(file[name], h5py.Dataset):
                if file[name].is_virtual or file[name].external:
                    raise DataError(f"{self.path}: {name} lies in other files; copy the data into the file")
                datasets[name] = file[name]
        if missing := {"image", "mask"} - set(datasets):
            raise DataError(
                f"{self.path}: no dataset {' and '.join(sorted(missing))} "
                f"(it has {', '.join(sorted(file)) or 'none'}); name a file of the multi-object layout"
            )
        image, mask = datasets["image"], datasets["mask"]
        if image.dtype != np.uint8 or len(image.shape) != 4 or image.shape[3] not in (1, 3):
            raise DataError(f"{self.path}: image is {image.dtype} {list(image.shape)}; it must be uint8 [N, H, W, 3]")
        if mask.dtype.kind not in "ui" or mask.shape not in ((*image.shape[:3], 1), image.shape[:3]):
            raise DataError(
                f"{self.path}: mask is {mask.dtype} {list(mask.shape)}; it must be integers {[*image.shape[:3], 1]}"
            )
        for name, dataset in datasets.items():
            if dataset.shape[:1] != image.shape[:1]:
                raise DataError(f"{self.path}: {name} is {list(dataset.shape)} for {len(image)} images; cut it to them")
        return datasets


def _scene(datasets: Mapping[str, Any], row: int) -> Iterator[Picture]:
    image = np.broadcast_to(datasets["image"][row], (*datasets["image"].shape[1:3], 3))
    ids = datasets["mask"][row].reshape(image.shape[:2])
    if ids.min(initial=0) < 0 or ids.max(initial=0) > 65535:
        raise BadRecord(f"ids from {ids.min()} to {ids.max()} in its mask; 0 to 65535 are possible")
    most = int(ids.max(initial=0))
    factors = {
        name: dataset[row]
        for name, dataset in sorted(datasets.items())
        if name not in ("image", "mask") and dataset.dtype.kind in "uifb" and len(dataset.shape) > 1
    }  # per name [K, ...]
    visibility = factors.pop("visibility", None)
    if visibility is None:
        values = {name: value[1:].tolist() for name, value in factors.items() if len(value) > most}
        yield Picture(image, ids.astype(np.int64), factors=values)
        return
    visible = visibility.reshape(len(visibility), -1).any(axis=1)  # [K]
    if most >= len(visible):
        raise BadRecord(f"id {most} in its mask of {len(visible)} entities")
    objects = np.flatnonzero(visible[1:]) + 1  # [n] entities that exist
    label = np.zeros(len(visible), dtype=np.int64)
    label[objects] = np.arange(1, len(objects) + 1)
    values = {name: value[objects].tolist() for name, value in factors.items() if len(value) == len(visible)}
    yield Picture(image, label[ids], num_objects=len(objects), factors=values)
