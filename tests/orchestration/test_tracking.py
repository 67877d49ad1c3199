"""MLflow gets each point once; against a real store."""

import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orchestration.assembly import build_model
from orchestration.engine import PlainEngine
from orchestration.recipe import Recipe, RecipeError, load_recipe, parse_recipe
from orchestration.runs.checkpoints import Points, committed
from orchestration.runs.folder import RunFolder
from orchestration.runs.saver import Saver, new_token
from orchestration.tracking import Tracker, store_uri, tracking_uri


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make its tables: once for all."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def folder(recipe: Recipe, home: Path, empty_store: Path) -> RunFolder:
    home.mkdir()
    shutil.copy(empty_store, home / "mlflow.db")
    folder = RunFolder.of(recipe)
    folder.claim(recipe)
    folder.note(data={"train": "abc", "eval": "def"})
    return folder


def points(first: int, last: int, attempt: int = 0) -> Points:
    """Two curves; a later attempt makes the same steps at other times."""
    steps = range(first, last)
    return [(name, step / 10, 1000 * attempt + step, step) for step in steps for name in ("loss/total", "slots/kept")]


def read_back(tracker: Tracker, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in tracker.client.get_metric_history(tracker.run_id, name))


def commit(recipe: Recipe, folder: RunFolder, steps: int, made: Points) -> None:
    saver = Saver(folder.checkpoints, new_token(), 0, 1, allowed=lambda: None)
    saver.save(steps, PlainEngine(build_model(recipe)), made, {"steps": steps})
    saver.wait(must=True)


def test_points_of_committed_checkpoints_arrive_once_through_restarts_and_redone_steps(
    recipe: Recipe, folder: RunFolder
) -> None:
    commit(recipe, folder, 4, points(1, 5))
    first = Tracker(recipe, folder)
    first.send_committed()
    first.send_committed()
    commit(recipe, folder, 8, points(5, 9))
    # A driver died here; the steps after 4 were redone by a later one, at other times.
    commit(recipe, folder, 8, points(5, 9, attempt=1))
    commit(recipe, folder, 12, points(9, 13, attempt=1))
    second = Tracker(recipe, folder)
    assert second.run_id == first.run_id
    second.send_committed()
    Tracker(recipe, folder).send_committed()
    for name in ("loss/total", "slots/kept"):
        assert read_back(second, name) == [(step, step / 10) for step in range(1, 13)]


def test_more_points_than_one_call_takes(recipe: Recipe, folder: RunFolder) -> None:
    tracker = Tracker(recipe, folder)
    tracker.send(points(1, 1501))
    assert len(read_back(tracker, "loss/total")) == 1500


class Halfway(Exception):
    """The server died in the middle of a call."""


@pytest.mark.parametrize("arrived", [slice(0, 3), slice(0, 3, 2), slice(1, 6, 2), slice(3, None), slice(0, None)])
def test_a_call_that_arrives_in_part_leaves_neither_gaps_nor_doubles(
    recipe: Recipe, folder: RunFolder, arrived: slice
) -> None:
    """Any part of it, cut between the metrics of a step too; and whoever made the points makes them anew, at other
    times, or the same driver tries again, or a later one does."""
    tracker = Tracker(recipe, folder)
    tracker.send(points(1, 3))
    send = tracker.client.log_batch

    def dies(run_id: str, metrics: Any) -> None:
        send(run_id, metrics=metrics[arrived])
        raise Halfway

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Halfway):
        patch.setattr(tracker.client, "log_batch", dies)
        tracker.send(points(3, 7))
    later = Tracker(recipe, folder)
    for writer in (tracker, later):
        writer.send(points(3, 9, attempt=1))
    for name in ("loss/total", "slots/kept"):
        assert read_back(tracker, name) == [(step, step / 10) for step in range(1, 9)]


def test_a_driver_that_dies_while_it_makes_the_run_does_not_leave_a_second_one(
    recipe: Recipe, folder: RunFolder
) -> None:
    def dies(*_: Any, **__: Any) -> None:
        raise Halfway

    for method in ("log_batch", "log_text"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Halfway):
            patch.setattr(MlflowClient, method, dies)
            Tracker(recipe, folder)
    tracker = Tracker(recipe, folder)
    assert tracker.client.get_run(tracker.run_id).data.params["train.batch_size"] == "16"
    experiment = tracker.client.get_experiment_by_name(recipe.tracking.experiment)
    assert experiment is not None
    assert [run.info.run_id for run in tracker.client.search_runs([experiment.experiment_id])] == [tracker.run_id]


def test_a_picture_of_a_step_is_there_once(recipe: Recipe, folder: RunFolder) -> None:
    picture = PIL.Image.new("RGB", (20, 10), "red")
    for _ in range(2):
        tracker = Tracker(recipe, folder)
        for step in (5, 10):
            tracker.picture("scenes", step, picture)
            tracker.picture("scenes", step, picture)
    names = [entry.path for entry in tracker.client.list_artifacts(tracker.run_id, "images")]
    assert sorted(name.split("+")[2] for name in names if name.endswith(".png")) == ["10", "5"]


def test_checkpoints_are_deleted_only_after_their_points_are_sent(recipe: Recipe, folder: RunFolder) -> None:
    for steps in range(4, 24, 4):
        commit(recipe, folder, steps, points(steps - 3, steps + 1))
    tracker = Tracker(recipe, folder)
    tracker.send_committed()
    assert [checkpoint.steps for checkpoint in committed(folder.checkpoints)] == [12, 16, 20]
    assert read_back(tracker, "loss/total") == [(step, step / 10) for step in range(1, 21)]


def test_checkpoints_that_are_committed_while_points_are_sent_are_not_lost(
    recipe: Recipe, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(recipe, folder, 4, points(1, 5))
    tracker = Tracker(recipe, folder)
    send = tracker.client.log_batch

    def slow(*arguments: Any, **options: Any) -> None:
        monkeypatch.undo()
        for steps in range(8, 32, 4):
            commit(recipe, folder, steps, points(steps - 3, steps + 1))
        send(*arguments, **options)

    monkeypatch.setattr(tracker.client, "log_batch", slow)
    tracker.send_committed()
    tracker.send_committed()
    assert read_back(tracker, "loss/total") == [(step, step / 10) for step in range(1, 29)]


def test_an_older_checkpoint_that_is_damaged_does_not_stop_the_others(recipe: Recipe, folder: RunFolder) -> None:
    for steps in (4, 8, 12):
        commit(recipe, folder, steps, points(steps - 3, steps + 1))
    committed(folder.checkpoints)[1].files.write("curve.json", b"[]")
    tracker = Tracker(recipe, folder)
    tracker.send_committed()
    tracker.send_committed()
    assert [step for step, _ in read_back(tracker, "loss/total")] == [1, 2, 3, 4, 9, 10, 11, 12]


def test_a_store_that_cannot_be_asked_is_not_a_run_that_is_gone(
    recipe: Recipe, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tracker(recipe, folder)

    def down(*_: Any) -> None:
        raise MlflowException("connection refused")

    monkeypatch.setattr(MlflowClient, "get_run", down)
    with pytest.raises(MlflowException, match="connection refused"):
        Tracker(recipe, folder)


def test_a_password_does_not_get_into_the_recipe(recipe: Recipe) -> None:
    fields = recipe.model_dump(mode="json")
    fields["tracking"]["uri"] = "https://me:secret@mlflow.example.org"
    with pytest.raises(RecipeError, match=r"tracking.uri.*MLFLOW_TRACKING_PASSWORD"):
        parse_recipe(fields)


def test_a_run_tells_its_recipe_and_its_data(recipe: Recipe, folder: RunFolder) -> None:
    tracker = Tracker(recipe, folder)
    run = tracker.client.get_run(tracker.run_id)
    assert run.info.run_name == "small"
    assert run.data.params["train.batch_size"] == "16"
    assert run.data.params["model.encoder.strides"] == "[2, 1]"
    assert run.data.tags["slotforge.data.train"] == "abc"
    assert run.data.tags["slotforge.recipe_digest"] == recipe.digest()
    assert [artifact.path for artifact in tracker.client.list_artifacts(tracker.run_id)] == ["recipe.yaml"]


def test_a_relative_store_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    relative = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"uri": "sqlite:///mlflow.db"})})
    with pytest.raises(RecipeError, match=r"tracking.uri: 'sqlite:///mlflow.db' is relative; write sqlite:////"):
        tracking_uri(relative)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with pytest.raises(RecipeError, match=r"MLFLOW_TRACKING_URI: 'sqlite:///mlflow.db' is relative"):
        tracking_uri(recipe)


def test_a_store_in_a_folder_that_is_not_there_is_made(recipe: Recipe, folder: RunFolder, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'new' / 'folder' / 'mlflow.db'}"
    asked = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"uri": uri})})
    assert Tracker(asked, folder).uri == uri and (tmp_path / "new" / "folder" / "mlflow.db").is_file()


def test_the_store_is_the_recipes_or_the_environments_or_the_state_folders(
    recipe: Recipe, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store_uri(None) == tracking_uri(recipe) == f"sqlite:///{home / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.org")
    assert store_uri(None) == tracking_uri(recipe) == "http://mlflow.example.org"
    assert store_uri("sqlite:////there/mlflow.db") == "sqlite:////there/mlflow.db"


def test_a_password_in_the_environments_store_is_refused_and_not_repeated(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.org")
    with pytest.raises(RecipeError, match=r"MLFLOW_TRACKING_URI.*MLFLOW_TRACKING_PASSWORD") as refusal:
        tracking_uri(recipe)
    assert "secret" not in str(refusal.value)


def test_a_recipe_from_mlflow_is_the_run_s(recipe: Recipe, folder: RunFolder, tmp_path: Path) -> None:
    tracker = Tracker(recipe, folder)
    path = tracker.client.download_artifacts(tracker.run_id, "recipe.yaml", str(tmp_path))
    assert load_recipe(path) == recipe
