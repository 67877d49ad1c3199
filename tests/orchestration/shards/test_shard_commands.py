"""slotforge shards make, ingest, index, verify and preview, as they are typed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner, Result

from orchestration.cli import app
from orchestration.shards.cli import shards
from pipelines import read_index
from pipelines.ingest import FORMATS
from pipelines.scenes import RENDERERS
from pipelines.shards import read_sample


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["shards", *(str(word) for word in words)])


def help_of(command: str) -> str:
    """The help of a command's parameters, as one line: the page wraps it."""
    context = get_command(shards).commands[command]  # type: ignore[attr-defined]
    return " ".join(getattr(parameter, "help", "") or "" for parameter in context.params)


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def tars(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def test_a_set_is_made_verified_damaged_and_looked_at(tmp_path: Path) -> None:
    words = ("make", "tetrominoes", tmp_path / "t", "--count", 30, "--eval", 5, "--per-shard", 20, "--local")
    made = run(*words, "--set", "pieces=[1, 2]", "--set", "cell=2")
    assert made.exit_code == 0, made.output
    train, held_out = read_index(tmp_path / "t" / "train"), read_index(tmp_path / "t" / "eval")
    assert [shard.samples for shard in (*train.shards, *held_out.shards)] == [20, 10, 5]
    assert train.size == (14, 14) and train.about["masks"] is True
    assert train.about["scenes"] == {"set": "tetrominoes", "seed": 0, "pieces": [1, 2], "grid": 7, "cell": 2}
    assert run("verify", tmp_path / "t" / "train", "--local").exit_code == 0
    assert run("index", tmp_path / "t" / "train", "--local").exit_code == 0
    assert read_index(tmp_path / "t" / "train").digest == train.digest
    looked = run("preview", tmp_path / "t" / "train", "--out", tmp_path / "p" / "p.png", "--samples", 6)
    assert looked.exit_code == 0 and Image.open(tmp_path / "p" / "p.png").format == "PNG"
    path = tmp_path / "t" / "train" / "000001.tar"
    path.write_bytes(path.read_bytes()[:-1])
    broken = run("verify", tmp_path / "t" / "train", "--local")
    assert broken.exit_code == 1 and "000001.tar" in broken.output and "bytes, the index says" in broken.output
    assert broken.output.endswith("1 problem\n")
    path.unlink()
    assert run("verify", tmp_path / "t" / "eval", "--local").exit_code == 0
    assert run("verify", tmp_path / "nowhere", "--local").exit_code == 1


@pytest.mark.parametrize("name", sorted(RENDERERS))
def test_every_registered_set_is_made_however_it_is_cut(tmp_path: Path, name: str) -> None:
    small = ("--set", "size=16") if name == "clevr" else ()  # a picture of CLEVR takes ten milliseconds
    scenes = []
    for per_shard in (3, 10):
        out = tmp_path / str(per_shard)
        words = ("make", name, out, "--count", 8, "--eval", 2, "--seed", 5, "--per-shard", per_shard, "--local", *small)
        result = run(*words)
        assert result.exit_code == 0, result.output
        samples = []
        for part in ("train", "eval"):
            assert run("verify", out / part, "--local").exit_code == 0
            for shard in read_index(out / part).shards:
                rows = (read_sample(out / part, shard.name, row)[1] for row in range(shard.samples))
                samples += [(members["image.png"], members["masks.png"], members["json"]) for members in rows]
        scenes.append(samples)
    assert scenes[0] == scenes[1] and len(set(scenes[0])) == 10


def test_images_are_ingested_and_bad_ones_stop_it(tmp_path: Path) -> None:
    pictures(tmp_path / "in", 20)
    done = run("ingest", tmp_path / "in", tmp_path / "out", "--size", 4, "--local")
    assert done.exit_code == 0 and "19 training images, 1 held out, 0 records left out" in done.output, done.output
    (tmp_path / "in" / "3.png").write_bytes(b"broken")
    bad = run("ingest", tmp_path / "in", tmp_path / "bad", "--size", 4, "--local")
    assert bad.exit_code == 1 and "3.png" in bad.output and not (tmp_path / "bad" / "train" / "index.json").exists()
    skipped = run("ingest", tmp_path / "in", tmp_path / "bad", "--size", 4, "--local", "--skip-bad")
    assert skipped.exit_code == 0 and "left out: 3.png" in skipped.output and "1 record left out" in skipped.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("make", "nothing", "out"), "use one of"),
        (("make", "tetrominoes"), "give a SET and a folder"),
        (("make", "tetrominoes", "out", "--recipe", "demo"), "not both"),
        (("make", "tetrominoes", "out", "--set", "pieces"), "not a field=value"),
        (("make", "tetrominoes", "out", "--set", "colour=3"), "its fields are pieces"),
        (("make", "tetrominoes", "out", "--set", "pieces=[3, 1]"), "reorder"),
        (("make", "tetrominoes", "out", "--set", "pieces=["), "as in YAML"),
        (("ingest", "in", "out", "--format", "jpeg"), "format: 'jpeg'"),
        (("ingest", "in", "out", "--crop", "left"), "crop: 'left'"),
        (("ingest", "in", "out", "--only", "test"), "only: 'test'"),
    ],
)
def test_wrong_words_exit_with_2_and_a_sentence(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("command", ["make", "ingest", "index", "verify", "preview"])
def test_every_command_teaches_by_an_example(command: str) -> None:
    assert f"slotforge shards {command}" in run(command, "--help").output.replace("\n ", "")


def test_the_help_names_every_set_and_format() -> None:
    assert f"one of {', '.join(RENDERERS)}" in help_of("make")
    assert f"one of {', '.join(FORMATS)}" in help_of("ingest")


def test_a_ray_that_does_not_start_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup")

    ours = {"SLOTFORGE_HOME": str(tmp_path), "RAY_ADDRESS": "", "RAY_AUTH_MODE": "token"}
    monkeypatch.setattr(os, "environ", {**os.environ, **ours})  # what is set for Ray ends with the test
    monkeypatch.setattr("ray.init", late)
    result = run("make", "tetrominoes", tmp_path)
    assert result.exit_code == 1 and "timed out during startup" in result.output and "--local" in result.output


@pytest.mark.slow
def test_ray_makes_the_same_bytes_and_tells_what_is_bad(tmp_path: Path) -> None:
    """A process of its own: Ray wants its token before it is imported."""
    pictures(tmp_path / "in", 30)
    here = run("ingest", tmp_path / "in", tmp_path / "here", "--per-shard", 4, "--local")
    assert here.exit_code == 0
    environment = os.environ | {
        "SLOTFORGE_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RAY_ADDRESS": "",
    }

    def by_ray(*words: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "orchestration.cli", "shards", *(str(word) for word in words)]
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)

    there = by_ray("ingest", tmp_path / "in", tmp_path / "there", "--per-shard", 4)
    assert there.returncode == 0, there.stderr
    assert tars(tmp_path / "here") == tars(tmp_path / "there") and len(tars(tmp_path / "here")) == 7 + 1
    (tmp_path / "in" / "13.png").write_bytes(b"broken")
    bad = by_ray("ingest", tmp_path / "in", tmp_path / "bad", "--per-shard", 4)
    assert bad.returncode == 1 and "13.png" in bad.stderr and "Traceback" not in bad.stderr
    assert not (tmp_path / "bad" / "train" / "index.json").exists()
