"""Existing shards, as the Object-Centric Learning Framework and as we write them."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from test_ingest_folder import members_of

from pipelines.errors import DataError
from pipelines.ingest import Framing, Ingest, WebDataset, ingest
from pipelines.samples import decode
from pipelines.scenes import Tetrominoes, render_shard
from pipelines.shards import read_index, verify

IDS = np.array([[0, 1, 1, 0], [2, 2, 0, 0], [0, 0, 5, 5]], dtype=np.uint8)
PLANES = np.stack([IDS == 1, IDS == 2, IDS == 5])  # bool [E, H, W]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def image(format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(36, dtype=np.uint8).reshape(3, 4, 3)).save(buffer, format=format)
    return buffer.getvalue()


def make(folder: Path, *samples: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    with wds.TarWriter(str(folder / "shard-0.tar"), encoder=False) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:04d}", **sample})


def run(tmp_path: Path, **how: Any) -> list[tuple[np.ndarray | None, dict[str, Any], dict[str, bytes]]]:
    ingest(Ingest(WebDataset(tmp_path / "in"), only="train", **how), tmp_path / "out")
    read = []
    for members in members_of(tmp_path / "out" / "train"):
        masks = decode(members, with_masks="masks.png" in members).masks
        read.append((masks, json.loads(members["json"]), members))
    return read


@pytest.mark.parametrize(
    ("member", "data"),
    [
        ("mask.npy", npy(IDS)),
        ("mask.npy.gz", gzip.compress(npy(IDS.astype(np.int64)))),
        ("mask.npy", npy(PLANES)),
        ("mask.npy", npy(PLANES[..., None].astype(np.uint8) * 255)),
        ("masks.npy", npy(IDS)),
    ],
)
def test_masks_in_each_form_are_the_same(tmp_path: Path, member: str, data: bytes) -> None:
    other = {"bbox.npy": npy(np.zeros((3, 4))), "category.npy": npy(np.array([11, 12, 13]))}
    make(tmp_path / "in", {"image.jpg": image("JPEG"), member: data, **other})
    ((masks, facts, members),) = run(tmp_path)
    assert np.array_equal(masks, np.select([IDS == 1, IDS == 2, IDS == 5], [1, 2, 3], 0))  # type: ignore[arg-type]
    assert facts["num_objects"] == 3 and members["image.jpg"] == image("JPEG")
    assert set(members) == {"image.jpg", "masks.png", "json"}
    if data != npy(IDS) and "gz" not in member:  # of ids 1, 2, 5 three categories do not tell which is whose
        assert facts["factors"] == {"category": [11, 12, 13]}


def test_visibility_tells_the_background_and_the_objects(tmp_path: Path) -> None:
    planes = np.stack([IDS == 0, IDS == 1, np.zeros_like(IDS) > 0, IDS == 2, IDS == 5])
    visibility, category = npy(np.array([1, 1, 1, 0, 1])), npy(np.arange(5))
    make(
        tmp_path / "in",
        {"png": image(), "mask.npy": npy(planes), "visibility.npy": visibility, "category.npy": category},
    )
    ((masks, facts, _),) = run(tmp_path)
    assert np.array_equal(masks, np.select([IDS == 1, IDS == 5], [1, 3], 0))  # type: ignore[arg-type]
    assert facts["num_objects"] == 3 and facts["factors"] == {"category": [1, 2, 4]}


def test_later_planes_lie_on_top(tmp_path: Path) -> None:
    planes = np.stack([np.ones((3, 4)), IDS == 1]).astype(np.uint8)
    make(tmp_path / "in", {"image.png": image(), "mask.npy": npy(planes)})
    ((masks, facts, _),) = run(tmp_path)
    assert np.array_equal(masks, 1 + (IDS == 1)) and facts["num_objects"] == 2  # type: ignore[arg-type]


def test_images_alone_are_taken_too(tmp_path: Path) -> None:
    make(tmp_path / "in", {"jpg": image("JPEG"), "cls": b"3"}, {"png": image(), "json": b'{"num_objects": 4}'})
    (first, second) = run(tmp_path)
    assert first[0] is None and "num_objects" not in first[1] and second[1]["num_objects"] == 4
    assert read_index(tmp_path / "out" / "train").about["masks"] is False


def test_our_own_shards_keep_what_they_know(tmp_path: Path) -> None:
    scenes = Tetrominoes((1, 3), 5, 4)
    render_shard(tmp_path / "in", scenes, seed=2, shard=0, count=6)
    before = members_of(tmp_path / "in")
    run(tmp_path, per_shard=4)
    after = members_of(tmp_path / "out" / "train")
    for old, new in zip(before, after, strict=True):
        assert old["image.png"] == new["image.png"] and old["masks.png"] == new["masks.png"]
        facts = json.loads(new["json"])
        assert facts.pop("source").startswith("000000.tar 000000-") and facts == json.loads(old["json"])
    assert verify(tmp_path / "out" / "train") == []
    run(tmp_path, per_shard=4, framing=Framing(10))
    assert read_index(tmp_path / "out" / "train").size == (10, 10)


def _pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        ({"cls": b"1"}, r"no image member \(it has cls\)"),
        ({"png": image()[:50]}, ""),
        ({"png": image(), "mask.npy": _pickled()}, "allow_pickle"),
        ({"png": image(), "mask.npy": npy(IDS[:2])}, r"mask.npy is uint8 \[2, 4\]"),
        ({"png": image(), "mask.npy": npy(IDS.astype(float))}, "mask.npy is float64"),
        ({"png": image(), "mask.npy": npy(-IDS.astype(int))}, "ids from -5"),
        ({"png": image(), "mask.npy.gz": gzip.compress(npy(IDS))[:-12]}, "cut off"),
        ({"png": image(), "mask.npy": npy(PLANES), "visibility.npy": npy(np.ones(2))}, "2 values for 3 planes"),
        ({"png": image(), "json": b"{"}, "json: "),
    ],
)
def test_a_bad_sample_is_named(tmp_path: Path, sample: dict[str, Any], problem: str) -> None:
    make(tmp_path / "in", sample, {"png": image()})
    with pytest.raises(DataError, match=rf"shard-0\.tar 0000: .*{problem}"):
        run(tmp_path)
    assert len(run(tmp_path, skip_bad=True)) == 1


def test_a_damaged_tar_is_named(tmp_path: Path) -> None:
    make(tmp_path / "in", {"png": image()}, {"png": image()})
    path = tmp_path / "in" / "shard-0.tar"
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"shard-0\.tar: not a whole WebDataset tar"):
        run(tmp_path)
