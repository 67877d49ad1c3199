"""A folder of images becomes two disjoint sets of squares."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import DataError
from pipelines.ingest import ingest_folder
from pipelines.samples import decode
from pipelines.shards import verify


def save(path: Path, pixels: np.ndarray, **how) -> None:  # type: ignore[no-untyped-def]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


def flat(number: int, height: int = 6, width: int = 9) -> np.ndarray:
    return np.full((height, width, 3), number, dtype=np.uint8)


def members_of(folder: Path) -> list[dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for entry in tar:
                key, name = entry.name.split(".", 1)
                samples.setdefault(key, {})[name] = tar.extractfile(entry).read()  # type: ignore[union-attr]
    return list(samples.values())


def sources(folder: Path) -> list[str]:
    return [json.loads(members["json"])["source"] for members in members_of(folder)]


def test_images_come_in_natural_order_and_in_one_set_only(tmp_path: Path) -> None:
    names = [f"img{n}.png" for n in range(1, 21)] + ["sub/a.JPG", "sub/b.webp"]
    for number, name in enumerate(names):
        save(tmp_path / "in" / name, flat(number))
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    result = ingest_folder(tmp_path / "in", tmp_path / "out", size=4, samples_per_shard=8, held_out=0.1)
    train, held_out = sources(tmp_path / "out" / "train"), sources(tmp_path / "out" / "eval")
    assert len(held_out) == 2 and sorted(train + held_out) == sorted(names)
    assert train == [name for name in names if name not in held_out]
    assert [shard.samples for shard in result.train.shards] == [8, 8, 4]
    assert result.held_out is not None and result.held_out.num_samples == 2 and result.train.size == (4, 4)
    assert verify(tmp_path / "out" / "train") == verify(tmp_path / "out" / "eval") == []


def test_equal_folders_give_equal_sets(tmp_path: Path) -> None:
    for number in range(9):
        save(tmp_path / "in" / f"{number}.png", flat(number))
    results = [ingest_folder(tmp_path / "in", tmp_path / out, size=4) for out in ("a", "b")]
    assert results[0].train.digest == results[1].train.digest
    assert results[0].train.digest != results[0].held_out.digest  # type: ignore[union-attr]


def test_the_centre_is_cut_out_and_turned_upright(tmp_path: Path) -> None:
    wide = np.zeros((4, 8, 3), dtype=np.uint8)
    wide[:, 2:6] = np.arange(4)[None, :, None] * 60  # the centre square; black beside it
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned a quarter to the left
    save(tmp_path / "in" / "a.png", wide)
    save(tmp_path / "in" / "b.png", np.ascontiguousarray(np.rot90(wide)), exif=exif)
    ingest_folder(tmp_path / "in", tmp_path / "out", size=4, held_out=0)
    for members in members_of(tmp_path / "out" / "train"):
        assert np.array_equal(decode(members, with_masks=False).image, wide[:, 2:6])
    assert not (tmp_path / "out" / "eval").exists()


@pytest.mark.parametrize("palette", [False, True])
def test_masks_follow_their_images_and_are_renumbered(tmp_path: Path, palette: bool) -> None:
    ids = np.zeros((4, 8), dtype=np.uint8)
    ids[:, 0], ids[:2, 2:4], ids[2:, 5] = 3, 7, 200  # 3 lies outside the centre square
    save(tmp_path / "in" / "x" / "a.jpg", flat(9, 4, 8))
    mask = Image.fromarray(ids)
    if palette:
        mask.putpalette(list(range(255, -1, -1)) * 3)
    (tmp_path / "masks" / "x").mkdir(parents=True)
    mask.save(tmp_path / "masks" / "x" / "a.png")
    ingest_folder(tmp_path / "in", tmp_path / "out", size=8, masks=tmp_path / "masks", held_out=0)
    (members,) = members_of(tmp_path / "out" / "train")
    sample = decode(members, with_masks=True)
    expected = np.select([ids == 7, ids == 200], [1, 2], 0)[:, 2:6].repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(sample.masks, expected) and sample.num_objects == 2


def test_unreadable_files_are_named_and_left_out(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path / "in" / f"{number}.png", flat(number))
    (tmp_path / "in" / "2.png").write_bytes(b"broken")
    (tmp_path / "in" / "4.png").write_bytes((tmp_path / "in" / "4.png").read_bytes()[:45])
    result = ingest_folder(tmp_path / "in", tmp_path / "out", size=4, held_out=0)
    assert sources(tmp_path / "out" / "train") == ["0.png", "1.png", "3.png", "5.png"]
    assert [line.split()[0] for line in result.unreadable] == ["2.png", "4.png"]


def test_what_cannot_be_ingested_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="not a folder"):
        ingest_folder(tmp_path / "nowhere", tmp_path / "out", size=4)
    with pytest.raises(DataError, match="no images"):
        ingest_folder(tmp_path / "in", tmp_path / "out", size=4)
    save(tmp_path / "in" / "a.png", flat(1))
    with pytest.raises(DataError, match="no readable image for the train set"):  # the only one is held out
        ingest_folder(tmp_path / "in", tmp_path / "out", size=4)
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match=r"1 of 1 masks are missing, the first is a\.png"):
        ingest_folder(tmp_path / "in", tmp_path / "out", size=4, masks=tmp_path / "masks")
    save(tmp_path / "masks" / "a.png", np.zeros((5, 5), dtype=np.uint8))
    with pytest.raises(DataError, match="1 found, 1 unreadable"):  # the mask has another size
        ingest_folder(tmp_path / "in", tmp_path / "out", size=4, masks=tmp_path / "masks", held_out=0)
    for change, message in (
        ({"size": 0}, "size: 0"),
        ({"samples_per_shard": 0}, "shard: 0"),
        ({"held_out": 1.0}, "held_out"),
    ):
        with pytest.raises(ValueError, match=message):
            ingest_folder(tmp_path / "in", tmp_path / "out", **({"size": 4} | change))
