"""HDF5 in the multi-object layout, written by h5py."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from test_ingest_folder import members_of

from pipelines.errors import DataError
from pipelines.ingest import Hdf5, Ingest, ingest
from pipelines.samples import decode

COUNT, ENTITIES = 7, 4


def make(path: Path, visibility: bool = True, **change: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "image": random.integers(0, 256, (COUNT, 6, 8, 3), dtype=np.uint8),
        "mask": random.integers(0, ENTITIES, (COUNT, 6, 8, 1), dtype=np.uint8),
        "shape": random.integers(0, 3, (COUNT, ENTITIES)),
        "color": random.random((COUNT, ENTITIES, 3), dtype=np.float32),
        "scene_number": np.arange(COUNT),
    }
    if visibility:
        seen = random.random((COUNT, ENTITIES)) < 0.6
        seen[:, 0] = True
        arrays["visibility"] = seen
    arrays |= change
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if array is not None:
                file[name] = array
    return arrays


@pytest.mark.parametrize("visibility", [True, False])
def test_scenes_come_out_as_they_went_in(tmp_path: Path, visibility: bool) -> None:
    arrays = make(tmp_path / "a.hdf5", visibility)
    ingest(Ingest(Hdf5(tmp_path / "a.hdf5"), only="train", per_shard=3), tmp_path / "out")
    read = members_of(tmp_path / "out" / "train")
    assert len(read) == COUNT
    for row, members in enumerate(read):
        sample, facts = decode(members, with_masks=True), json.loads(members["json"])
        ids = arrays["mask"][row, ..., 0]
        seen = arrays["visibility"][row] if visibility else np.isin(np.arange(ENTITIES), ids)
        objects = [i for i in range(1, ENTITIES) if seen[i]]
        assert np.array_equal(sample.image, arrays["image"][row])
        expected = sum((ids == i) * label for label, i in enumerate(objects, start=1))
        assert np.array_equal(sample.masks, np.zeros_like(ids) + expected)  # type: ignore[arg-type]
        assert sample.num_objects == len(objects)
        assert facts["factors"]["shape"] == arrays["shape"][row, objects].tolist()
        assert facts["factors"]["color"] == arrays["color"][row, objects].tolist()
        assert set(facts["factors"]) == {"shape", "color"} and facts["source"] == f"a.hdf5 row {row}"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"mask": None}, r"no dataset mask \(it has color, image"),
        ({"image": np.zeros((COUNT, 6, 8, 3))}, "image is float64"),
        ({"mask": np.zeros((COUNT, 6, 7, 1), np.uint8)}, r"mask is uint8 \[7, 6, 7, 1\]"),
        ({"shape": np.zeros((3, ENTITIES))}, r"shape is \[3, 4\] for 7 images"),
        ({"mask": np.full((COUNT, 6, 8, 1), 9, np.uint8)}, "row 0: id 9 in its mask of 4 entities"),
        ({"mask": np.full((COUNT, 6, 8, 1), -1)}, "row 0: ids from -1"),
        ({"shape": h5py.ExternalLink("/etc/passwd", "/x")}, "shape is a link to elsewhere"),
        ({"shape": h5py.SoftLink("/nowhere")}, "shape is a link to elsewhere"),
    ],
)
def test_another_layout_is_named(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    make(tmp_path / "a.hdf5", **change)
    with pytest.raises(DataError, match=problem):
        ingest(Ingest(Hdf5(tmp_path / "a.hdf5"), only="train"), tmp_path / "out")


def test_data_in_other_files_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "other.hdf5")
    layout = h5py.VirtualLayout((COUNT, ENTITIES), dtype=np.int64)
    layout[:] = h5py.VirtualSource(tmp_path / "other.hdf5", "shape", (COUNT, ENTITIES))
    for kind in ("virtual", "external"):
        make(tmp_path / "a.hdf5", shape=None)
        with h5py.File(tmp_path / "a.hdf5", "a") as file:
            if kind == "virtual":
                file.create_virtual_dataset("shape", layout)
            else:
                external = [(str(tmp_path / "other.hdf5"), 0, 8 * COUNT * ENTITIES)]
                file.create_dataset("shape", (COUNT, ENTITIES), np.int64, external=external)
        with pytest.raises(DataError, match="shape lies in other files"):
            Ingest(Hdf5(tmp_path / "a.hdf5")).pieces()


def test_what_is_no_hdf5_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.hdf5").write_bytes(b"text")
    for name in ("a.hdf5", "nowhere.hdf5"):
        with pytest.raises(DataError, match=rf"{name}: no HDF5 file"):
            Ingest(Hdf5(tmp_path / name)).pieces()
