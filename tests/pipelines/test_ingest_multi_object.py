"""DeepMind's multi-object sets: files in their format, written by others' encoders, against the arrays they hold."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_ingest_folder import members_of
from written_examples import Values, example, floats, integers, one_byte, write

from pipelines.errors import DataError
from pipelines.ingest import MULTI_OBJECT, Examples, Framing, Ingest, ingest, open_source
from pipelines.ingest.job import Piece
from pipelines.samples import decode
from pipelines.shards import read_index, verify

SHAPES = {  # by format: image, mask, axis of the entities, as the publisher's reader has them
    "tetrominoes": ((35, 35, 3), (4, 35, 35, 1), 0),
    "multi-dsprites-binarized": ((64, 64, 1), (64, 64, 4, 1), 2),
    "multi-dsprites-on-grayscale": ((64, 64, 3), (64, 64, 6, 1), 2),
    "multi-dsprites-on-colored": ((64, 64, 3), (64, 64, 5, 1), 2),
    "objects-room": ((64, 64, 3), (7, 64, 64, 1), 0),
    "clevr-with-masks": ((240, 320, 3), (11, 240, 320, 1), 0),
}


class Scene:
    """A random scene: its features, and what must come out."""

    def __init__(self, format: str, seed: int) -> None:
        random = np.random.default_rng(seed)
        image, mask, axis = SHAPES[format]
        entities = mask[axis]
        height, width = image[:2]
        visible = np.zeros(entities, dtype=np.float32)
        visible[0] = 1
        visible[1 + random.permutation(entities - 1)[: random.integers(1, entities)]] = 1
        exist = np.arange(entities) if format == "objects-room" else np.flatnonzero(visible)
        owner = random.choice(exist, (height // 5, width // 5)).repeat(5, axis=0).repeat(5, axis=1)  # blocks of 5
        owner = np.pad(owner, ((0, height % 5), (0, width % 5)), constant_values=0)
        planes = (owner == np.arange(entities)[:, None, None]) * 255  # [E, H, W]
        self.pixels = random.integers(0, 256, image, dtype=np.uint8)
        self.features: dict[str, Values] = {
            "image": one_byte(self.pixels),
            "mask": one_byte(planes if axis == 0 else planes.transpose(1, 2, 0)),
        }
        self.factors: dict[str, list[object]] = {}
        if format == "objects-room":
            self.masks = np.maximum(owner - 3, 0)
            present = np.unique(self.masks[self.masks > 0])
            self.masks = np.where(self.masks > 0, np.searchsorted(present, self.masks) + 1, 0)
            self.count = len(present)
            return
        objects = np.flatnonzero(visible[1:]) + 1
        label = np.zeros(entities, dtype=int)
        label[objects] = np.arange(1, len(objects) + 1)
        self.masks, self.count = label[owner], len(objects)
        x, color = random.random(entities, dtype=np.float32), random.random((entities, 3), dtype=np.float32)
        shape = random.integers(0, 4, entities)
        self.features |= {"x": floats(x), "color": floats(color), "visibility": floats(visible)}
        self.features["shape"] = one_byte(shape) if format == "clevr-with-masks" else floats(shape)
        self.factors = {"x": x[objects].tolist(), "color": color[objects].tolist(), "shape": shape[objects].tolist()}

    def check(self, members: dict[str, bytes]) -> None:
        sample = decode(members, with_masks=True)
        facts = json.loads(members["json"])
        assert np.array_equal(sample.image, np.broadcast_to(self.pixels, (*self.pixels.shape[:2], 3)))
        assert np.array_equal(sample.masks, self.masks)  # type: ignore[arg-type]
        assert sample.num_objects == self.count and facts.get("factors", {}) == self.factors


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("format", SHAPES)
def test_scenes_come_out_as_they_went_in(tmp_path: Path, format: str, packed: bool) -> None:
    scenes = [Scene(format, seed) for seed in range(1 if "clevr" in format else 3)]
    path = write(tmp_path / "set.tfrecords", [example(scene.features) for scene in scenes], packed)
    result = ingest(Ingest(open_source(format, path), per_shard=2, only="train"), tmp_path / "out")
    read = members_of(tmp_path / "out" / "train")
    assert len(read) == len(scenes) and result.held_out is None
    for number, (scene, members) in enumerate(zip(scenes, read, strict=True)):
        scene.check(members)
        assert json.loads(members["json"])["source"] == f"set.tfrecords record {number}"
    assert verify(tmp_path / "out" / "train") == []
    about = read_index(tmp_path / "out" / "train").about
    assert about["masks"] is True and about["ingest"] == format and about["files"] == ["set.tfrecords"]


def test_clevr_is_cut_and_resized_as_published(tmp_path: Path) -> None:
    import torch

    scene = Scene("clevr-with-masks", 4)
    path = write(tmp_path / "clevr.tfrecords", [example(scene.features)], packed=True)
    job = Ingest(open_source("clevr-with-masks", path), Framing(128, "clevr"), only="train")
    ingest(job, tmp_path / "out")
    (members,) = members_of(tmp_path / "out" / "train")
    sample = decode(members, with_masks=True)
    cut = torch.from_numpy(scene.pixels[29:221, 64:256]).permute(2, 0, 1)[None].double()
    image = torch.nn.functional.interpolate(cut, (128, 128), mode="bilinear", align_corners=False)[0]
    assert np.abs(sample.image - image.permute(1, 2, 0).numpy()).max() <= 0.5 + 1e-3
    ids = torch.from_numpy(scene.masks[29:221, 64:256])[None, None].double()
    nearest = torch.nn.functional.interpolate(ids, (128, 128), mode="nearest-exact")[0, 0]
    assert np.array_equal(sample.masks, nearest.numpy())  # type: ignore[arg-type]
    assert sample.num_objects == scene.count  # the set's own count, though some may be cut away


def small(number: int) -> bytes:
    """A tetrominoes scene that tells its number."""
    image = np.zeros((35, 35, 3), dtype=np.uint8)
    image[0, 0, 0] = number
    mask = np.zeros((4, 35, 35), dtype=np.uint8)
    return example({"image": one_byte(image), "mask": one_byte(mask), "visibility": floats([1, 0, 0, 0])})


def numbers(folder: Path) -> list[int]:
    return [int(decode(members, with_masks=True).image[0, 0, 0]) for members in members_of(folder)]


def tars(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def write_all(job: Ingest, pieces: list[Piece], out: Path) -> None:
    job.finish(out, [done for piece in pieces for done in piece.write(out)])


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_packed_sets_are_the_same_however_many_read_them(tmp_path: Path, workers: int) -> None:
    path = write(tmp_path / "t.tfrecords", [small(n) for n in range(43)], packed=True)
    job = Ingest(open_source("tetrominoes", path), per_shard=4, held_out=0.2)
    write_all(job, job.pieces(1), tmp_path / "one")
    write_all(job, job.pieces(workers)[::-1], tmp_path / "many")
    assert tars(tmp_path / "one") == tars(tmp_path / "many")
    train, held_out = numbers(tmp_path / "one" / "train"), numbers(tmp_path / "one" / "eval")
    assert train == sorted(train) and held_out == sorted(held_out) and sorted(train + held_out) == list(range(43))
    assert abs(len(held_out) - 43 * 0.2) < 1 and set(np.diff(held_out)) == {5}


def test_a_limit_takes_the_first_records(tmp_path: Path) -> None:
    for packed in (True, False):
        path = write(tmp_path / "t.tfrecords", [small(n) for n in range(20)], packed)
        job = Ingest(open_source("tetrominoes", path), per_shard=4, only="eval", limit=6)
        result = ingest(job, tmp_path / "out")
        assert numbers(tmp_path / "out" / "eval") == list(range(6)) and result.train is None
        assert not (tmp_path / "out" / "train").exists()


def test_a_stopped_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tfrecords", [small(n) for n in range(12)], packed=True)
    job = Ingest(open_source("tetrominoes", path), per_shard=4, held_out=0)
    (piece,) = job.pieces()
    writing = piece.write(tmp_path / "out")
    next(writing), next(writing)
    writing.close()  # as if killed: two shards are there
    out = tmp_path / "out" / "train"
    assert sorted(p.name for p in out.glob("*.tar")) == ["000000.tar", "000001.tar"]
    assert not (out / "index.json").exists()
    kept = [(out / name).stat().st_ino for name in ("000000.tar", "000001.tar")]
    assert ingest(job, tmp_path / "out").train is not None
    assert [(out / name).stat().st_ino for name in ("000000.tar", "000001.tar")] == kept
    assert numbers(out) == list(range(12)) and verify(out) == []
    write(path, [small(n) for n in range(100, 112)], packed=True)  # another file: nothing is kept
    ingest(Ingest(open_source("tetrominoes", path), per_shard=4, held_out=0), tmp_path / "out")
    assert numbers(out) == list(range(100, 112))


@pytest.mark.parametrize("packed", [True, False])
def test_bad_records_are_named_and_left_out_on_request(tmp_path: Path, packed: bool) -> None:
    wrong = example({"image": one_byte(np.zeros(12)), "mask": one_byte(np.zeros(4 * 35 * 35))})
    records = [small(0), wrong, small(2), b"\xff\xff\xff", small(4)]
    path = write(tmp_path / "t.tfrecords", records, packed)
    job = Ingest(open_source("tetrominoes", path), per_shard=2, held_out=0)
    with pytest.raises(DataError, match=r"t\.tfrecords record 1: feature image: 12 values.*--skip-bad"):
        ingest(job, tmp_path / "out")
    job = Ingest(open_source("tetrominoes", path), per_shard=2, held_out=0, skip_bad=True)
    for _ in range(2):
        result = ingest(job, tmp_path / "out")
        assert [line.split(":")[0] for line in result.left_out] == ["t.tfrecords record 1", "t.tfrecords record 3"]
        assert numbers(tmp_path / "out" / "train") == [0, 2, 4]
    with tarfile.open(tmp_path / "out" / "train" / "000001.tar") as tar:  # cut by place, before anything is read
        assert {name.split(".")[0] for name in tar.getnames()} == {"00000002"}


@pytest.mark.parametrize(
    ("feature", "values", "problem"),
    [
        ("image", one_byte(np.zeros(35 * 35 * 4)), "feature image: 4900 values, tetrominoes has 35x35x3"),
        ("image", integers([1]), "feature image: it holds integers"),
        ("mask", one_byte(np.zeros(3 * 35 * 35)), "feature mask: 3675 values, tetrominoes has 4 planes"),
        ("visibility", floats([1, 0]), "visibility: 2 values for 4"),
        ("x", floats([1, 2, 3]), "feature x: 3 values for 4"),
    ],
)
def test_what_does_not_fit_the_set_is_named(tmp_path: Path, feature: str, values: Values, problem: str) -> None:
    features = {
        "image": one_byte(np.zeros(35 * 35 * 3)),
        "mask": one_byte(np.zeros(4 * 35 * 35)),
        "visibility": floats([1, 0, 1, 1]),
    } | {feature: values}
    path = write(tmp_path / "t.tfrecords", [example(features)], packed=False)
    with pytest.raises(DataError, match=problem):
        ingest(Ingest(open_source("tetrominoes", path), only="train"), tmp_path / "out")


def test_an_objects_room_of_a_test_set_has_other_planes(tmp_path: Path) -> None:
    for planes, objects in ((4, 0), (10, 6)):
        owner = (np.arange(64 * 64) * planes // (64 * 64)).reshape(64, 64)
        mask = (owner == np.arange(planes)[:, None, None]) * 255
        features = {"image": one_byte(np.zeros(64 * 64 * 3)), "mask": one_byte(mask)}
        path = write(tmp_path / f"{planes}.tfrecords", [example(features)], packed=True)
        ingest(Ingest(open_source("objects-room", path), only="eval"), tmp_path / str(planes))
        sample = decode(members_of(tmp_path / str(planes) / "eval")[0], with_masks=True)
        assert sample.num_objects == objects and np.array_equal(sample.masks, np.maximum(owner - 3, 0))  # type: ignore[arg-type]


def test_files_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    files = (write(tmp_path / "a", [small(0)], packed=True), write(tmp_path / "b", [small(1)], packed=False))
    with pytest.raises(DataError, match="some files are GZIP"):
        Ingest(Examples(files, MULTI_OBJECT["tetrominoes"])).pieces()
    both = Examples((files[1], write(tmp_path / "c", [small(2)], packed=False)), MULTI_OBJECT["tetrominoes"])
    ingest(Ingest(both, only="train"), tmp_path / "out")
    assert numbers(tmp_path / "out" / "train") == [1, 2]
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(DataError, match="no records"):
        Ingest(open_source("tetrominoes", tmp_path / "empty")).pieces()
