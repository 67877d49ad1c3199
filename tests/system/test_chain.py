"""The whole chain at a small size, every part real."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import RECIPE, Run

STEPS = RECIPE["train"]["steps"]


def test_one_command_goes_from_nothing_to_a_registered_model(twin: tuple[Run, str]) -> None:
    run, output = twin
    for said in ("FG-ARI on 90 held-out scenes", "objects against kept slots", "images/s", "waiting for data"):
        assert said in output
    assert f"mlflow ui --backend-store-uri {run.uri}" in output
    assert "slotforge predict IMAGE.png --model models:/slotforge-twin@champion" in output
    assert {path.name for path in (run.folder / "pictures").iterdir()} == {"scenes.png", "counts.png", "curves.png"}
    assert np.asarray(Image.open(run.folder / "pictures" / "scenes.png")).std() > 10
    assert run.client.get_run(run.run_id).info.status == "FINISHED"
    assert {a.path for a in run.client.list_artifacts(run.run_id)} >= {"recipe.yaml", "pictures"}
    program = "import mlflow, sys; mlflow.set_tracking_uri(sys.argv[1]); print(mlflow.pyfunc.load_model(sys.argv[2]))"
    command = [sys.executable, "-c", program, run.uri, "models:/slotforge-twin@champion"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=False, env=run.environment)
    assert loaded.returncode == 0, loaded.stderr
    assert "mlflow.pyfunc.loaded_model" in loaded.stdout


def test_every_curve_has_each_of_its_steps_once(twin: tuple[Run, str]) -> None:
    run, _ = twin
    curves = run.curves()
    every = list(range(10, STEPS + 1, 10))
    for name in ("loss/total", "loss/keep", "slots/kept_mean", "slots/count_error", "slots/keep_probability/3"):
        assert [step for step, _ in curves[name]] == every, name
    for name in ("time/step", "time/data_wait", "throughput/images_per_second"):
        assert [step for step, _ in run.points(name)] == every, name
    assert [step for step, _ in curves["eval/fg_ari"]] == [150, 300, 450, 600]
    ((last, final),) = curves["final/fg_ari"]
    assert last == STEPS
    assert final == pytest.approx(curves["eval/fg_ari"][-1][1], rel=1e-6)  # two ranks and one add up in other orders
    losses = [value for _, value in curves["loss/reconstruction"]]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(value == 4 for step, value in curves["slots/kept_mean"] if step <= 150)  # before the gate decides


def test_a_finished_run_goes_straight_to_evaluate_and_show(twin: tuple[Run, str]) -> None:
    run, first = twin
    before = run.curves()
    code, output = run.finish(run.start())
    assert code == 0, output
    assert f"finished at step {STEPS}" in output
    assert "starting Ray" not in output
    table = [line for line in first.splitlines() if "│" in line]
    assert [line for line in output.splitlines() if "│" in line] == table
    assert run.curves() == before
    assert len(run.client.search_model_versions("name = 'slotforge-twin'")) == 1


def test_a_changed_recipe_under_the_same_name_fails_and_names_the_field(twin: tuple[Run, str]) -> None:
    run, _ = twin
    code, output = run.finish(run.start("--set", "train.learning_rate=1e-3"))
    assert code == 2
    assert "train.learning_rate: 0.002 there, 0.001 here" in output


def test_the_model_finds_objects_in_an_image_of_ones_own(twin: tuple[Run, str], tmp_path: Path) -> None:
    run, _ = twin
    Image.fromarray(np.full((50, 40, 3), 200, dtype=np.uint8)).save(tmp_path / "mine.png")
    command = [
        *(str(Path(sys.executable).with_name("slotforge")), "predict", str(tmp_path / "mine.png")),
        *("--model", "models:/slotforge-twin@champion", "--tracking-uri", run.uri, "--out", str(tmp_path / "out")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mine.json", "mine.masks.png", "mine.slots.png"}
