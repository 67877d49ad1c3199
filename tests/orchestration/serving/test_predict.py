"""slotforge predict on files: as it is typed."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from served import photo
from typer.testing import CliRunner, Result

from orchestration.cli import app
from orchestration.serving.finder import Finder, ModelName
from orchestration.wording import counted


def run(model: ModelName, *words: object) -> Result:
    named = ("--model", "models:/slotforge-served@champion", "--tracking-uri", model.tracking)
    return CliRunner().invoke(app, ["predict", *(str(word) for word in words), *named])


def saved(path: Path, number: int, *size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(number, *size)).save(path)
    return path


def test_every_image_gets_pictures_and_facts(model: ModelName, finder: Finder, tmp_path: Path) -> None:
    images = [saved(tmp_path / f"{number}.png", number) for number in range(35)]  # more than go at once
    done = run(model, *images, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    expected = finder.find(np.stack([photo(number) for number in range(35)]))
    for number, found in enumerate(expected):
        facts = json.loads((tmp_path / "out" / f"{number}.json").read_text())
        assert facts.pop("image") == f"{number}.png" and facts.pop("model") == model.uri
        assert facts == {"box": [0, 0, 20, 20], **found.facts()}
        for kind, picture in (("masks", found.overlay()), ("slots", found.strip())):
            written = Image.open(tmp_path / "out" / f"{number}.{kind}.png")
            np.testing.assert_array_equal(np.asarray(written), picture)
    assert f"1.png: {counted(expected[1].objects, 'object')}" in done.output and "35 images in" in done.output


def test_a_photo_of_any_size_and_format(model: ModelName, tmp_path: Path) -> None:
    done = run(model, saved(tmp_path / "wide.jpg", 1, 100, 300), "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "wide.json").read_text())["box"] == [100, 0, 200, 100]


def test_broken_images_are_named_and_the_others_predicted(model: ModelName, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    alone = run(model, tmp_path / "text.png", saved(tmp_path / "c.png", 3), "--out", tmp_path / "alone")
    assert "1 image could not be predicted" in alone.output and "1 image in" in alone.output
    images = [
        saved(tmp_path / "a.png", 1),
        tmp_path / "text.png",
        tmp_path / "missing.png",
        saved(tmp_path / "b.png", 2),
    ]
    done = run(model, *images, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "text.png: neither a PNG nor a JPEG" in done.output
    assert "missing.png: cannot be read (No such file or directory)" in done.output
    assert "2 images could not be predicted" in done.output
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {"a.json", "b.json"}


def test_two_images_of_one_name_are_refused(model: ModelName, tmp_path: Path) -> None:
    done = run(model, saved(tmp_path / "a.png", 1), saved(tmp_path / "x" / "a.jpg", 2), "--out", tmp_path / "out")
    assert done.exit_code == 1 and "another image is called a too" in done.output


@pytest.mark.parametrize(
    "uri", ["runs:/abc/model", "/tmp/model", "models:/nothing@champion", "models:/slotforge-served/7"]
)
def test_only_models_of_the_registry_are_loaded(uri: str, model: ModelName, tmp_path: Path) -> None:
    words = ["predict", str(saved(tmp_path / "a.png", 1)), "--model", uri, "--tracking-uri", model.tracking]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and done.exception is not None and isinstance(done.exception, SystemExit)
    assert "slotforge: " in done.output


def test_files_and_sets_are_not_mixed(model: ModelName, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    done = run(model, saved(tmp_path / "a.png", 1), tmp_path / "folder")
    assert done.exit_code == 2 and "one folder or set of shards at a time" in done.output
    done = run(model, tmp_path / "folder", "--out", tmp_path / "out")
    assert done.exit_code == 1 and "neither an index.json nor an image" in done.output
