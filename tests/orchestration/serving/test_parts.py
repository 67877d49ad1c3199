"""Predictions of a set: parts that are whole or absent, the same whoever computes them and from wherever it is read."""

import io
import json
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from served import SIDE, photo
from test_images import encoded

from orchestration.serving.finder import Finder, ModelName
from orchestration.serving.parts import PER_PART, PartsError, claim, left_of, parts_of
from orchestration.serving.predict_sets import Predictor, Step, read_parts
from orchestration.serving.sources import FolderSource, ShardSource, Source, source_of
from pipelines import DataError, write_index, write_shard

BROKEN = 7  # the image that is none


def members(number: int) -> dict[str, object]:
    data = b"no image" if number == BROKEN else encoded(photo(number, 24, 24))
    return {"__key__": f"{number:04d}", "image.png": data}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards; the first one is of two parts."""
    folder, first = tmp_path_factory.mktemp("set"), PER_PART + 10
    cuts = [range(first), range(first, first + 20)]
    written = [write_shard(folder, f"{cut.start:04d}.tar", [members(number) for number in cut]) for cut in cuts]
    write_index(folder, written, {})
    return folder


def predict(source: Source, model: ModelName, out: Path) -> list[Step]:
    """What `predict_parts` does, in this process."""
    claim(out, source, model.uri)
    predictor = Predictor(model, out)
    tables = [table for parts in left_of(source, out).missing for table in read_parts(source, parts, SIDE)]
    return [Step(**row) for table in tables for row in predictor(table).to_pylist()]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_every_image_is_told_once_in_order(shards: Path, model: ModelName, finder: Finder, tmp_path: Path) -> None:
    (done,) = [predict(ShardSource(str(shards)), model, tmp_path)]
    assert [(step.images, step.failed) for step in done] == [(PER_PART, 1), (10, 0), (20, 0)]
    assert done[0].reasons == ["0007: image.png cannot be decoded (no image format that is known)"]
    names = ["0000-0000", "0000-0001", f"{PER_PART + 10:04d}-0000"]
    assert contents(tmp_path).keys() == {
        "predictions.json",
        *(f"{name}{end}" for name in names for end in (".tar", ".jsonl")),
    }
    lines = [json.loads(line) for name in names for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"{number:04d}" for number in range(PER_PART + 30)]
    for number in (0, PER_PART + 3, PER_PART + 29):
        square = Image.fromarray(photo(number, 24, 24)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        (found,) = finder.find(np.asarray(square)[None])
        facts = found.facts()
        assert lines[number] == {"key": f"{number:04d}", **facts}
        with tarfile.open(tmp_path / f"{names[(number >= PER_PART) + (number >= PER_PART + 10)]}.tar") as tar:
            for kind, picture in (("labels", found.labels()), ("overlay", found.overlay(enlarge=False))):
                member = tar.extractfile(f"{number:04d}.{kind}.png")
                assert member is not None
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(member.read()))), picture)
    assert lines[BROKEN].keys() == {"key", "error"}


def test_what_is_whole_is_not_computed_again(shards: Path, model: ModelName, tmp_path: Path) -> None:
    source = ShardSource(str(shards))
    predict(source, model, tmp_path)
    whole = contents(tmp_path)
    work = left_of(source, tmp_path)
    assert (work.missing, work.there, work.images) == ([], PER_PART + 30, 0)
    assert len(work.failed) == 1 and work.failed[0].startswith("0007: ")
    for name in ("0000-0001.jsonl", "0000-0001.tar"):  # killed between the two, or before both
        (tmp_path / name).unlink()
        (tmp_path / ".abc.partial").write_bytes(b"half")
        work = left_of(source, tmp_path)
        assert [part.name for parts in work.missing for part in parts] == ["0000-0001"] and work.images == 10
        predict(source, model, tmp_path)
        assert {name: data for name, data in contents(tmp_path).items() if name[0] != "."} == whole


def test_a_folder_is_of_one_set_and_one_model(shards: Path, tmp_path: Path) -> None:
    source = ShardSource(str(shards))
    claim(tmp_path, source, "models:/m/1")
    claim(tmp_path, source, "models:/m/1")
    with pytest.raises(PartsError, match="model models:/m/1 there, models:/m/2 now"):
        claim(tmp_path, source, "models:/m/2")
    Image.fromarray(photo(1)).save(tmp_path / "image.png")
    with pytest.raises(PartsError, match="digest"):
        claim(tmp_path, FolderSource(tmp_path), "models:/m/1")


def test_a_damaged_shard_costs_its_images_and_is_read_again_once_repaired(
    shards: Path, model: ModelName, tmp_path: Path
) -> None:
    copy = tmp_path / "set"
    copy.mkdir()
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    good = (copy / "0000.tar").read_bytes()
    (copy / "0000.tar").write_bytes(good[:-600] + bytes(600)[:-1] + b"x")
    out = tmp_path / "out"
    done = predict(ShardSource(str(copy)), model, out)
    assert [(step.images, step.failed) for step in done] == [(PER_PART, PER_PART), (10, 10), (20, 0)]
    assert "0000.tar: the shard's checksum is not the one in its index" in done[0].reasons[0]
    assert not list(out.glob("0000*"))
    (copy / "0000.tar").write_bytes(good)
    assert [step.failed for step in predict(ShardSource(str(copy)), model, out)] == [1, 0]


def test_a_set_from_afar_gives_the_same(shards: Path, model: ModelName, tmp_path: Path) -> None:
    predict(ShardSource(str(shards)), model, tmp_path / "near")
    handler = partial(SimpleHTTPRequestHandler, directory=str(shards))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = source_of(f"http://user:secret@127.0.0.1:{server.server_address[1]}")
        assert source.digest == ShardSource(str(shards)).digest
        predict(source, model, tmp_path / "far")
        server.shutdown()
    assert "secret" not in (tmp_path / "far" / "predictions.json").read_text()
    near, far = contents(tmp_path / "near"), contents(tmp_path / "far")
    del near["predictions.json"], far["predictions.json"]
    assert near == far


def test_images_of_a_folder(model: ModelName, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, number in (("10.png", 1), ("9.JPG", 2), ("more/a.jpeg", 3)):
        Image.fromarray(photo(number)).save(folder / name)
    (folder / "broken.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (done,) = predict(source_of(str(folder)), model, tmp_path / "out")
    assert (done.images, done.failed) == (4, 1) and done.reasons[0].startswith("broken.png: ")
    lines = [json.loads(line) for line in (tmp_path / "out" / "images-000000-0000.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["9.JPG", "10.png", "broken.png", "more/a.jpeg"]
    before = source_of(str(folder)).digest
    (folder / "notes.txt").write_text("still none")
    assert source_of(str(folder)).digest == before
    Image.fromarray(photo(5)).save(folder / "11.png")
    assert source_of(str(folder)).digest != before


def test_a_place_without_a_set_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither an index.json nor an image"):
        source_of(str(tmp_path))
    with pytest.raises(DataError, match="not there"):
        source_of(str(tmp_path / "nowhere"))


@given(st.lists(st.integers(1, 3 * PER_PART), min_size=1, max_size=9))
def test_parts_hold_every_image_of_a_unit_once(sizes: list[int]) -> None:
    invented = SimpleNamespace(units=[(f"{unit}", images) for unit, images in enumerate(sizes)])
    parts = parts_of(invented)  # type: ignore[arg-type]
    assert len({part.name for part in parts}) == len(parts)
    assert max(part.last - part.first for part in parts) <= PER_PART
    covered = [(part.unit, image) for part in parts for image in range(part.first, part.last)]
    assert covered == [(unit, image) for unit, images in enumerate(sizes) for image in range(images)]
