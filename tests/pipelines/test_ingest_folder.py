"""A folder of images becomes two disjoint sets, with masks or without, cut and resized or as they are."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import DataError
from pipelines.ingest import BadRecord, Folder, Framing, Ingest, Ingested, ingest
from pipelines.samples import decode
from pipelines.shards import read_index, verify


def save(path: Path, pixels: np.ndarray, **how) -> None:  # type: ignore[no-untyped-def]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


def flat(number: int, height: int = 6, width: int = 9) -> np.ndarray:
    return np.full((height, width, 3), number, dtype=np.uint8)


def run(tmp_path: Path, masks: str | None = None, size: int | None = 4, crop: str | None = None, **how) -> Ingested:  # type: ignore[no-untyped-def]
    source = Folder(tmp_path / "in", None if masks is None else tmp_path / masks)
    return ingest(Ingest(source, Framing(size, crop), **how), tmp_path / "out")


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
    result = run(tmp_path, per_shard=8, held_out=0.1)
    train, held_out = sources(tmp_path / "out" / "train"), sources(tmp_path / "out" / "eval")
    assert len(held_out) == 2 and sorted(train + held_out) == sorted(names)
    assert train == [name for name in names if name not in held_out]
    assert result.train is not None and [shard.samples for shard in result.train.shards] == [8, 8, 4]
    assert result.held_out is not None and result.held_out.num_samples == 2 and result.train.size == (4, 4)
    assert verify(tmp_path / "out" / "train") == verify(tmp_path / "out" / "eval") == []


def test_equal_folders_give_equal_sets(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        for number in range(9):
            save(tmp_path / folder / "in" / f"{number}.png", flat(number))
    results = [run(tmp_path / folder) for folder in ("a", "b")]
    assert results[0].train == results[1].train and results[0].held_out == results[1].held_out
    assert results[0].train != results[0].held_out


def test_the_centre_is_cut_out_and_turned_upright(tmp_path: Path) -> None:
    wide = np.zeros((4, 8, 3), dtype=np.uint8)
    wide[:, 2:6] = np.arange(4)[None, :, None] * 60  # the centre square; black beside it
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned a quarter to the left
    save(tmp_path / "in" / "a.png", wide)
    save(tmp_path / "in" / "b.png", np.ascontiguousarray(np.rot90(wide)), exif=exif)
    run(tmp_path, held_out=0)
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
    result = run(tmp_path, masks="masks", size=8, held_out=0)
    (members,) = members_of(tmp_path / "out" / "train")
    sample = decode(members, with_masks=True)
    expected = np.select([ids == 7, ids == 200], [1, 2], 0)[:, 2:6].repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(sample.masks, expected) and sample.num_objects == 2  # type: ignore[arg-type]
    assert result.train is not None and result.train.about["masks"] is True


def test_ids_of_16_bits_are_renumbered_into_8(tmp_path: Path) -> None:
    ids = np.array([[0, 300, 300], [40000, 0, 7]], dtype=np.uint16)
    save(tmp_path / "in" / "a.png", flat(0, 2, 3))
    save(tmp_path / "masks" / "a.png", ids)
    run(tmp_path, masks="masks", size=None, held_out=0)
    (members,) = members_of(tmp_path / "out" / "train")
    sample = decode(members, with_masks=True)
    assert np.array_equal(sample.masks, [[0, 2, 2], [3, 0, 1]]) and sample.num_objects == 3  # type: ignore[arg-type]


def test_jpegs_stay_as_they_are_until_they_are_cut_or_turned(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    save(tmp_path / "in" / "a.jpg", pixels)
    save(tmp_path / "in" / "b.png", pixels)
    save(tmp_path / "in" / "c.jpg", pixels, exif=exif)
    save(tmp_path / "in" / "d.webp", pixels, lossless=True)
    run(tmp_path, size=None, held_out=0)
    first, second, third, fourth = members_of(tmp_path / "out" / "train")
    assert first["image.jpg"] == (tmp_path / "in" / "a.jpg").read_bytes()
    assert second["image.png"] == (tmp_path / "in" / "b.png").read_bytes()
    with Image.open(tmp_path / "in" / "c.jpg") as turned:
        upright = np.array(turned)[::-1, ::-1]  # lossless from what the JPEG decodes to
    assert np.array_equal(np.array(Image.open(io.BytesIO(third["image.png"]))), upright)
    assert np.array_equal(np.array(Image.open(io.BytesIO(fourth["image.png"]))), pixels)
    assert read_index(tmp_path / "out" / "train").about["masks"] is False
    run(tmp_path, size=8, held_out=0)  # it is of this size already
    assert members_of(tmp_path / "out" / "train")[0] == first
    run(tmp_path, size=7, held_out=0)
    assert {"image.png"} == {name for m in members_of(tmp_path / "out" / "train") for name in m if "image" in name}


@pytest.mark.parametrize(
    ("crop", "size", "expected"), [("centre", None, (6, 6)), ("none", 4, (4, 4)), (None, None, (6, 9))]
)
def test_crops_and_sizes_combine(tmp_path: Path, crop: str | None, size: int | None, expected: tuple[int, int]) -> None:
    save(tmp_path / "in" / "a.png", np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3))
    result = run(tmp_path, size=size, crop=crop, held_out=0)
    assert result.train is not None and result.train.size == expected


def test_a_broken_file_stops_the_work_and_is_named(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path / "in" / f"{number}.png", flat(number))
    (tmp_path / "in" / "2.png").write_bytes(b"broken")
    with pytest.raises(BadRecord, match=r"2\.png: .*--skip-bad"):
        run(tmp_path, held_out=0, per_shard=2)
    assert not (tmp_path / "out" / "train" / "index.json").exists()
    assert sources(tmp_path / "out" / "train") == ["0.png", "1.png"]  # whole shards, or nothing


def test_broken_files_are_left_out_named_and_counted_on_request(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path / "in" / f"{number}.png", flat(number))
    (tmp_path / "in" / "2.png").write_bytes(b"broken")
    (tmp_path / "in" / "4.png").write_bytes((tmp_path / "in" / "4.png").read_bytes()[:45])
    save(tmp_path / "in" / "6.png", np.arange(600, 604, dtype=np.uint16).reshape(2, 2))  # Pillow would make it white
    for _ in range(2):  # the second time from what lies there
        result = run(tmp_path, held_out=0, skip_bad=True, per_shard=2)
        assert sources(tmp_path / "out" / "train") == ["0.png", "1.png", "3.png", "5.png"]
        assert [line.split(":")[0] for line in result.left_out] == ["2.png", "4.png", "6.png"]
        assert "more than 8 bits" in result.left_out[2]
        about = read_index(tmp_path / "out" / "train").about
        assert about["left_out"] == 3 and about["left_out_names"] == list(result.left_out)
    assert verify(tmp_path / "out" / "train") == []


def test_what_cannot_be_ingested_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="not a folder"):
        ingest(Ingest(Folder(tmp_path / "nowhere")), tmp_path / "out")
    with pytest.raises(DataError, match="no images"):
        run(tmp_path)
    save(tmp_path / "in" / "a.png", flat(1))
    with pytest.raises(DataError, match="no usable record for the train set"):  # the only one is held out
        run(tmp_path)
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match=r"1 of 1 masks are missing, the first is a\.png"):
        run(tmp_path, masks="masks")
    save(tmp_path / "masks" / "a.png", np.zeros((5, 5), dtype=np.uint8))
    with pytest.raises(DataError, match=r"a\.png: mask a\.png is 5x5, its image 6x9"):
        run(tmp_path, masks="masks", held_out=0)
    save(tmp_path / "masks" / "a.png", flat(0))
    with pytest.raises(DataError, match=r"mask a\.png: a mask of mode RGB"):
        run(tmp_path, masks="masks", held_out=0)
    with pytest.raises(DataError, match="CLEVR crop is for pictures of 240x320, this one is 6x9"):
        run(tmp_path, crop="clevr", held_out=0)
    save(tmp_path / "in" / "b.png", flat(1, 7, 9))
    with pytest.raises(DataError, match=r"b\.png: 7x9 pixels, but a\.png has 6x9.*--size"):
        run(tmp_path, size=None, held_out=0)
    with pytest.raises(DataError, match="image sizes differ"):
        run(tmp_path, size=None, held_out=0, per_shard=1)
