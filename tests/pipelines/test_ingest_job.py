"""What every ingest keeps: shards cut by place, held-out records evenly spaced, whole sets or none."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_ingest_folder import flat, members_of, save

from pipelines.errors import DataError
from pipelines.ingest import FORMATS, Folder, Framing, Ingest, ingest, open_source
from pipelines.ingest.job import evenly_spaced
from pipelines.ingest.picture import Picture, members
from pipelines.ingest.pieces import is_held_out
from pipelines.samples import decode
from pipelines.shards import read_index, verify


@given(st.integers(1, 300), st.floats(0, 0.99))
def test_whatis_held_out_is_evenly_spaced(count: int, share: float) -> None:
    chosen = np.flatnonzero(evenly_spaced(count, share))
    assert len(chosen) == (max(1, round(count * share)) if share else 0)
    if len(chosen) > 1:
        gaps = np.diff(chosen)
        assert gaps.max() - gaps.min() <= 1


@given(st.integers(1, 3000), st.floats(0, 0.99))
def test_a_stream_holds_out_as_much_without_knowing_its_length(count: int, share: float) -> None:
    chosen = np.flatnonzero([is_held_out(place, share) for place in range(count)])
    assert abs(len(chosen) - count * share) <= 0.5 + 1e-6
    if len(chosen) > 1:
        gaps = np.diff(chosen)
        assert gaps.max() - gaps.min() <= 1


def images(folder: Path, count: int) -> Path:
    for number in range(count):
        save(folder / f"{number}.png", flat(number))
    return folder


def tars(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def test_pieces_travel_and_may_be_done_in_any_order(tmp_path: Path) -> None:
    job = Ingest(Folder(images(tmp_path / "in", 23)), per_shard=4, held_out=0.2)
    ingest(job, tmp_path / "one")
    pieces = pickle.loads(pickle.dumps(job.pieces()))[::-1]
    assert sum(piece.samples for piece in pieces) == 23
    job.finish(tmp_path / "two", [done for piece in pieces for done in piece.write(tmp_path / "two")])
    assert tars(tmp_path / "one") == tars(tmp_path / "two") and len(tars(tmp_path / "one")) == 5 + 2
    for part in ("train", "eval"):
        assert (tmp_path / "one" / part / "index.json").read_bytes() == (
            tmp_path / "two" / part / "index.json"
        ).read_bytes()


def inodes(folder: Path) -> list[int]:
    return [path.stat().st_ino for path in sorted(folder.rglob("*.tar"))]


def test_only_what_changed_is_made_again(tmp_path: Path) -> None:
    job = Ingest(Folder(images(tmp_path / "in", 12)), per_shard=4, held_out=0)
    ingest(job, tmp_path / "out")
    first = inodes(tmp_path / "out")
    ingest(job, tmp_path / "out")
    assert inodes(tmp_path / "out") == first
    save(tmp_path / "in" / "5.png", flat(200))
    ingest(job, tmp_path / "out")
    second = inodes(tmp_path / "out")
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True]
    colors = [decode(sample, with_masks=False).image[0, 0, 0] for sample in members_of(tmp_path / "out" / "train")]
    assert colors == [0, 1, 2, 3, 4, 200, *range(6, 12)]
    ingest(Ingest(Folder(tmp_path / "in"), Framing(5), per_shard=4, held_out=0), tmp_path / "out")
    assert read_index(tmp_path / "out" / "train").size == (5, 5)
    assert verify(tmp_path / "out" / "train") == []


def test_shards_of_another_set_are_not_taken_in(tmp_path: Path) -> None:
    ingest(Ingest(Folder(images(tmp_path / "in", 12)), per_shard=4, held_out=0), tmp_path / "out")
    with pytest.raises(DataError, match=r"train: holds 000001\.tar, which is not a shard of this set \(2 such files\)"):
        ingest(Ingest(Folder(tmp_path / "in"), per_shard=12, held_out=0), tmp_path / "out")
    assert not (tmp_path / "out" / "train" / "index.json").exists()


def test_a_set_of_bad_records_is_no_set(tmp_path: Path) -> None:
    images(tmp_path / "in", 6)
    job = Ingest(Folder(tmp_path / "in"), per_shard=2, held_out=0, skip_bad=True)
    ingest(job, tmp_path / "out")
    for number in range(2, 4):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"broken")
    result = ingest(job, tmp_path / "out")  # the shard that has no good record any more is gone
    assert result.train is not None and [s.name for s in result.train.shards] == ["000000.tar", "000002.tar"]
    assert verify(tmp_path / "out" / "train") == []
    for number in range(6):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"no usable record for the train set \(6 bad\)"):
        ingest(job, tmp_path / "out")
    assert not (tmp_path / "out" / "train" / "index.json").exists()


def test_storage_that_fails_is_never_a_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path / "in", 3)

    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.suffix == ".png":
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DataError, match=r"0\.png: .*Input/output error.*repair the storage"):
        ingest(Ingest(Folder(tmp_path / "in"), held_out=0, skip_bad=True), tmp_path / "out")


def test_more_objects_than_8_bits_hold_are_written_readable_or_not_at_all(tmp_path: Path) -> None:
    ids = np.arange(20 * 20, dtype=np.uint16).reshape(20, 20)
    save(tmp_path / "in" / "a.png", flat(0, 20, 20))
    save(tmp_path / "masks" / "a.png", ids)
    job = Ingest(Folder(tmp_path / "in", tmp_path / "masks"), held_out=0)
    try:
        ingest(job, tmp_path / "out")
    except DataError as error:
        assert "a.png: its 399 objects cannot be read again" in str(error)  # noqa: PT017
        assert list((tmp_path / "out").rglob("*.tar")) == []
    else:
        (sample,) = members_of(tmp_path / "out" / "train")
        assert np.array_equal(decode(sample, with_masks=True).masks, ids)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="65536 objects are more"):
        members("a", "a", Picture(flat(0, 1, 1), np.array([[65536]])))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"per_shard": 0}, "per_shard: 0"),
        ({"limit": 0}, "limit: 0"),
        ({"held_out": 1.0}, "held_out: 1.0"),
        ({"only": "test"}, "only: 'test'"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ingest(Folder(Path("in")), **fields)


def test_wrong_framings_and_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size: 0"):
        Framing(0)
    with pytest.raises(ValueError, match="crop: 'left'"):
        Framing(4, "left")
    with pytest.raises(ValueError, match="format: 'jpeg' is not known; use one of images, coco"):
        open_source("jpeg", tmp_path)
    with pytest.raises(ValueError, match="images: the format hdf5"):
        open_source("hdf5", tmp_path, images=tmp_path)
    with pytest.raises(ValueError, match="masks: the format coco"):
        open_source("coco", tmp_path, masks=tmp_path)
    (tmp_path / "a.tfrecord").write_bytes(b"")
    assert [open_source(name, tmp_path).format for name in FORMATS] == list(FORMATS)


def test_a_photo_shrinks_without_aliasing(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    ingest(Ingest(Folder(tmp_path), Framing(8), held_out=0), tmp_path / "out")
    (sample,) = members_of(tmp_path / "out" / "train")
    image = decode(sample, with_masks=False).image
    assert np.abs(image.astype(int) - 127).max() <= 16  # grey; without smoothing it would be black or white
