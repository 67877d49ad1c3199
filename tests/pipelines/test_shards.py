"""Shards: plain WebDataset, equal bytes for equal samples, whole or not at all, and every damage found."""

import binascii
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from pipelines.errors import DataError
from pipelines.index import Index
from pipelines.samples import BadSample, decode, encode
from pipelines.scenes.render import render_shard
from pipelines.scenes.tetrominoes import Tetrominoes
from pipelines.shards import (
    INDEX,
    index_folder,
    kept_shard,
    read_index,
    read_sample,
    read_sidecar,
    verify,
    write_index,
    write_shard,
)

SCENES = Tetrominoes((2, 4), 7, 3)
MakeSet = Callable[..., Index]


def picture(number: int) -> np.ndarray:
    return np.full((8, 6, 3), number, dtype=np.uint8)


def test_plain_webdataset_reads_what_the_renderer_drew(tmp_path: Path) -> None:
    render_shard(tmp_path, SCENES, seed=5, shard=7, count=12)
    read = list(wds.WebDataset(str(tmp_path / "000007.tar"), shardshuffle=False).decode("rgb8"))
    scenes = SCENES.render(5, 7, 12)
    assert [sample["__key__"] for sample in read] == [f"000007-{row:06d}" for row in range(12)]
    for row, sample in enumerate(read):
        assert np.array_equal(sample["image.png"], scenes.images[row])
        assert np.array_equal(sample["masks.png"][..., 0], scenes.masks[row])
        count = scenes.num_objects[row]
        assert sample["json"]["num_objects"] == count
        factors = sample["json"]["factors"]
        assert set(factors) == {"shape", "color", "x", "y"}
        for name, values in factors.items():
            assert np.array_equal(np.array(values, dtype=np.float32), scenes.factors[name][row, :count])


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        shards = [render_shard(tmp_path / folder, SCENES, 1, shard, 9) for shard in range(2)]
        write_index(tmp_path / folder, shards, {"seed": 1})
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["000000.tar", "000000.tar.offsets.json", "000001.tar", "000001.tar.offsets.json", INDEX]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_index_comes_back_and_counts_the_files(tmp_path: Path, make_set: MakeSet) -> None:
    index = make_set(tmp_path, [3, 1, 4])
    read = read_index(tmp_path)
    assert read == index and read.digest == index.digest and read.about == {"made": "for a test", "masks": True}
    assert read.size == (8, 6)
    assert [shard.samples for shard in read.shards] == [3, 1, 4]
    assert [shard.bytes for shard in read.shards] == [(tmp_path / s.name).stat().st_size for s in read.shards]


def test_offsets_cut_a_tar_into_its_samples(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(tmp_path, [5])
    sidecar = read_sidecar(tmp_path, "000.tar")
    offsets = sidecar.offsets
    data = (tmp_path / "000.tar").read_bytes()
    for row in range(5):
        assert sidecar.crc32[row] == binascii.crc32(data[offsets[row] : offsets[row + 1]])
        with tarfile.open(fileobj=io.BytesIO(data[offsets[row] : offsets[row + 1]] + bytes(1024))) as tar:
            assert tar.getnames() == [f"s0r{row}.{name}" for name in ("image.png", "json", "masks.png")]


def test_a_whole_shard_of_the_same_source_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "000000.tar"
    first = render_shard(tmp_path, SCENES, 0, 0, 5)
    before = path.stat().st_ino
    assert render_shard(tmp_path, SCENES, 0, 0, 5) == first and path.stat().st_ino == before
    for seed, scenes, count in ((1, SCENES, 5), (0, Tetrominoes((1, 1), 7, 3), 5), (0, SCENES, 6)):
        inode = path.stat().st_ino
        render_shard(tmp_path, scenes, seed, 0, count)
        assert path.stat().st_ino != inode
    assert render_shard(tmp_path, SCENES, 0, 0, 5) == first


def test_a_damaged_shard_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "000000.tar"
    first = render_shard(tmp_path, SCENES, 0, 0, 5)
    good = path.read_bytes()
    for damaged in (good[:-600], good[:700] + b"x" + good[701:], b""):
        path.write_bytes(damaged)
        assert kept_shard(tmp_path, path.name, {}) is None
        assert render_shard(tmp_path, SCENES, 0, 0, 5) == first and path.read_bytes() == good
    Path(f"{path}.offsets.json").unlink()
    assert render_shard(tmp_path, SCENES, 0, 0, 5) == first
    assert read_sidecar(tmp_path, path.name).shard == first


def test_failed_writing_leaves_nothing(tmp_path: Path) -> None:
    def samples():  # type: ignore[no-untyped-def]
        yield encode("a", picture(0))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_shard(tmp_path, "0.tar", samples())
    assert list(tmp_path.iterdir()) == []


def test_killed_writing_leaves_no_shard_and_the_next_run_tidies_up(tmp_path: Path) -> None:
    program = """
import os, sys
import numpy as np
from pipelines.samples import encode
from pipelines.shards import write_shard

def samples():
    yield encode("a", np.zeros((4, 4, 3), np.uint8))
    os._exit(9)

write_shard(sys.argv[1], "000000.tar", samples())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment).returncode == 9
    assert list(tmp_path.glob("*.tar")) == [] and not (tmp_path / INDEX).exists()
    with pytest.raises(DataError, match="not complete"):
        read_index(tmp_path)
    write_index(tmp_path, [write_shard(tmp_path, "000000.tar", [encode("a", picture(0))])], {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.tar", "000000.tar.offsets.json", INDEX]
    assert verify(tmp_path) == []


def test_rewriting_a_shard_takes_the_index_away(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(tmp_path, [2, 2])
    write_shard(tmp_path, "001.tar", [encode("other", picture(9))])
    with pytest.raises(DataError, match="not complete"):
        read_index(tmp_path)


def test_verify_finds_nothing_in_a_good_set(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(tmp_path, [3, 2])
    assert verify(tmp_path) == []


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "file", "problem"),
    [
        (lambda f: (f / "000.tar").unlink(), "000.tar", "missing"),
        (lambda f: (f / "000.tar").write_bytes((f / "000.tar").read_bytes()[:-10]), "000.tar", "bytes, the index says"),
        (lambda f: _flip(f / "001.tar"), "001.tar", "checksum"),
        (lambda f: (f / "001.tar.offsets.json").unlink(), "001.tar.offsets.json", "not there"),
        (lambda f: _edit(f / "001.tar.offsets.json", '"offsets":[0,', '"offsets":[512,'), "001.tar", "does not match"),
        (lambda f: (f / "001.tar.offsets.json").write_text("{"), "001.tar.offsets.json", "not a sidecar"),
        (lambda f: (f / "zzz.tar").write_bytes((f / "000.tar").read_bytes()), "zzz.tar", "not in the index"),
        (lambda f: _edit(f / INDEX, '"samples":3', '"samples":4'), INDEX, "digest"),
        (lambda f: (f / INDEX).unlink(), INDEX, "not complete"),
        (lambda f: (f / INDEX).write_text("[]"), INDEX, "not an index"),
        (lambda f: _edit(f / INDEX, '"version":1', '"version":2'), INDEX, "version 2"),
    ],
)
def test_verify_names_each_kind_of_damage(tmp_path: Path, make_set: MakeSet, damage, file: str, problem: str) -> None:  # type: ignore[no-untyped-def]
    make_set(tmp_path, [3, 2])
    damage(tmp_path)
    problems = verify(tmp_path)
    assert len(problems) == 1 and file in problems[0] and problem in problems[0], problems


@pytest.mark.parametrize(
    ("member", "data", "problem"),
    [
        ("image.png", None, "no image member"),
        ("image.png", b"\x89PNG broken", "cannot be decoded"),
        ("image.png", encode("x", np.zeros((9, 6, 3), np.uint8))["image.png"], "image.png is 9x6, the set is 8x6"),
        ("masks.png", encode("x", np.zeros((9, 6, 3), np.uint8))["image.png"], "does not hold ids"),
        ("masks.png", encode("x", np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8))["masks.png"], "[4, 4]"),
        ("json", b"{", "json cannot be decoded"),
        ("json", b'{"num_objects": "3"}', "not a count"),
    ],
)
def test_verify_names_each_bad_sample(
    tmp_path: Path, make_set: MakeSet, member: str, data: bytes | None, problem: str
) -> None:
    make_set(tmp_path, [3, 2], {1: {member: data}})
    problems = verify(tmp_path)
    assert len(problems) == 1 and "000.tar: s0r1" in problems[0] and problem in problems[0], problems


def test_verify_compares_the_members_of_samples(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(tmp_path / "one", [3, 2], {4: {"json": None}})
    (problem,) = verify(tmp_path / "one")
    assert "001.tar: s1r1: no json, which other" in problem
    make_set(tmp_path / "most", [3, 2], {row: {"json": None} for row in range(3)})
    problems = verify(tmp_path / "most")
    assert [f"s1r{row}: it has json, which other" in problems[row] for row in range(2)] == [True] * len(problems)


def test_verify_misses_masks_only_where_they_are_promised(tmp_path: Path, make_set: MakeSet) -> None:
    index = make_set(tmp_path, [3, 2], {4: {"masks.png": None}})
    assert index.about["masks"] is False and verify(tmp_path) == []
    _edit(tmp_path / INDEX, '"masks":false', '"masks":true')
    (problem,) = verify(tmp_path)
    assert "001.tar: s1r1: no masks, which other" in problem


def test_verify_counts_a_key_that_comes_twice(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for key in ("a", "b", "a"):
            writer.write({"__key__": key, "png": encode("x", picture(0))["image.png"]})
    index_folder(tmp_path)
    assert verify(tmp_path) == [f"{tmp_path / 'a.tar'}: key 'a' comes 2 times"]


@pytest.mark.parametrize(("members", "masks"), [({"masks.png"}, True), (set(), False)])
def test_an_index_says_whether_there_are_masks(tmp_path: Path, members: set[str], masks: bool) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for row in range(3):
            whole = encode(f"k{row}", picture(row), np.zeros((8, 6), np.uint8))
            writer.write({name: data for name, data in whole.items() if name in {"__key__", "image.png"} | members})
    assert index_folder(tmp_path).about["masks"] is masks
    assert read_index(tmp_path).about["masks"] is masks
    assert verify(tmp_path) == []


def test_indexing_again_keeps_what_made_a_shard(tmp_path: Path) -> None:
    shard = render_shard(tmp_path, SCENES, 5, 0, 4)
    before = (tmp_path / "000000.tar.offsets.json").read_bytes()
    index_folder(tmp_path)
    assert (tmp_path / "000000.tar.offsets.json").read_bytes() == before
    inode = (tmp_path / shard.name).stat().st_ino
    assert render_shard(tmp_path, SCENES, 5, 0, 4) == shard and (tmp_path / shard.name).stat().st_ino == inode


def test_a_sidecar_of_an_older_version_is_read(tmp_path: Path, make_set: MakeSet) -> None:
    index = make_set(tmp_path, [2])
    path = tmp_path / "000.tar.offsets.json"
    content = json.loads(path.read_text())
    del content["masks"], content["left_out"], content["crc32"]
    path.write_text(json.dumps(content))
    assert read_sidecar(tmp_path, "000.tar").masks is None and verify(tmp_path) == []
    assert write_index(tmp_path, index.shards, {"masks": True}).about == {"masks": True}


def test_any_row_is_read_alone(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(tmp_path, [3, 4])
    for row in range(4):
        key, members = read_sample(tmp_path, "001.tar", row)
        assert key == f"s1r{row}" and np.array_equal(decode(members, with_masks=True).image[0, 0], [3 + row, 0, 0])
    with pytest.raises(DataError, match="row 4"):
        read_sample(tmp_path, "001.tar", 4)
    (tmp_path / "001.tar").write_bytes(b"")
    with pytest.raises(DataError, match="row 0"):
        read_sample(tmp_path, "001.tar", 0)


def test_an_existing_webdataset_is_indexed(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Image.fromarray(picture(3)).save(jpeg, format="JPEG")
    for name in ("part-10.tar", "part-9.tar"):  # natural order: 9 before 10
        with wds.TarWriter(str(tmp_path / name)) as writer:
            for row in range(3):
                writer.write({"__key__": f"sub/{name[:-4]}-{row}", "jpg": jpeg.getvalue(), "cls": row})
    index = index_folder(tmp_path)
    assert [(shard.name, shard.samples) for shard in index.shards] == [("part-9.tar", 3), ("part-10.tar", 3)]
    assert index.size == (8, 6) and verify(tmp_path) == [] and read_index(tmp_path) == index


def test_a_truncated_or_damaged_tar_is_not_indexed(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(tmp_path, [4])
    path, good = tmp_path / "000.tar", (tmp_path / "000.tar").read_bytes()
    second = read_sidecar(tmp_path, path.name).offsets[1]
    header = bytearray(good)
    header[second + 5] ^= 255  # tarfile would end here without a word
    for damaged in (good[:second], good[: second + 700], bytes(header), b"", b"no tar at all" * 100):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"000\.tar: not a whole"):
            index_folder(tmp_path)


def test_what_cannot_be_a_set_is_refused(tmp_path: Path, make_set: MakeSet) -> None:
    with pytest.raises(DataError, match=r"no \*\.tar"):
        index_folder(tmp_path)
    with pytest.raises(ValueError, match="no samples"):
        write_shard(tmp_path, "0.tar", [])
    with pytest.raises(ValueError, match=r"\.tar"):
        write_shard(tmp_path, "0.zip", [encode("a", picture(0))])
    with pytest.raises(ValueError, match="key 'a' is taken"):
        write_shard(tmp_path, "0.tar", [encode("a", picture(0)), encode("a", picture(1))])
    assert not list(tmp_path.glob("*.tar"))
    sizes = [
        write_shard(tmp_path, f"{side}.tar", [encode("a", np.zeros((side, side, 3), np.uint8))]) for side in (4, 5)
    ]
    with pytest.raises(DataError, match=r"sizes differ \(4\.tar 4x4, 5\.tar 5x5\)"):
        write_index(tmp_path, sizes, {})


def test_nothing_in_a_sample_is_unpickled() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    members = {"image.png": encode("x", picture(0))["image.png"], "masks.npy": buffer.getvalue()}
    with pytest.raises(BadSample, match="allow_pickle"):
        decode(members, with_masks=True)


def test_masks_as_npy_equal_masks_as_png() -> None:
    ids = np.arange(48, dtype=np.uint8).reshape(8, 6)
    members = encode("x", picture(0), ids)
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(np.int64))
    as_npy = {"image.png": members["image.png"], "masks.npy": buffer.getvalue()}
    for sample in (decode(members, with_masks=True), decode(as_npy, with_masks=True)):
        assert sample.masks is not None and np.array_equal(sample.masks, ids) and sample.masks.dtype == np.uint8


@pytest.mark.parametrize("most", [255, 256, 65535])
def test_masks_hold_as_many_objects_as_16_bits_tell_apart(most: int) -> None:
    ids = np.linspace(0, most, 48).round().astype(np.uint16).reshape(8, 6)
    image, buffer, npy = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(ids).save(image, format="PNG")  # I;16
    Image.fromarray(ids).convert("I").save(buffer, format="TIFF")
    np.save(npy, ids.astype(np.uint32))
    members = {"image.png": encode("x", picture(0))["image.png"]}
    for found in (
        encode("x", picture(0), ids),
        members | {"masks.png": image.getvalue()},
        members | {"masks.npy": npy.getvalue()},
    ):
        masks = decode(found, with_masks=True).masks
        assert masks is not None and masks.dtype in (np.uint8, np.uint16) and np.array_equal(masks, ids)
    with pytest.raises(BadSample, match="does not hold ids"):
        decode(members | {"masks.png": buffer.getvalue()}, with_masks=True)
    npy = io.BytesIO()
    np.save(npy, ids.astype(np.int64) + 65536 - most)
    with pytest.raises(BadSample, match=r"0 \.\. 65535"):
        decode(members | {"masks.npy": npy.getvalue()}, with_masks=True)


def test_an_image_in_deep_grey_is_refused_by_name() -> None:
    """Pillow would clip it to white, and which of its bits count the file does not say."""
    for mode in ("I;16", "I", "F"):
        buffer = io.BytesIO()
        deep = np.arange(600, 648).reshape(8, 6).astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
        Image.fromarray(deep).save(buffer, format="PNG" if mode == "I;16" else "TIFF")
        with pytest.raises(BadSample, match=r"image\.png cannot be decoded .*grey of more than 8 bits"):
            decode({"image.png": buffer.getvalue()}, with_masks=False)


def test_importing_the_package_takes_no_torch() -> None:
    program = (
        "import sys, pipelines, pipelines.scenes.render, pipelines.ingest;"
        "sys.exit(bool({'torch', 'webdataset'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


def test_the_index_is_json_that_people_can_read(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(tmp_path, [3, 2])
    content = json.loads((tmp_path / INDEX).read_text())
    assert content["samples"] == 5 and content["size"] == [8, 6]
    assert set(content["shards"][0]) == {"name", "bytes", "sha256", "samples"}
