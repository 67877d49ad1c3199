"""Where a run is, and who it is."""

from pathlib import Path

import pytest

from orchestration.recipe import Recipe, RecipeError
from orchestration.runs.folder import RunFolder
from orchestration.runs.lease import Lease
from orchestration.runs.storage import read_json


@pytest.fixture
def folder(place: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("SLOTFORGE_RUNS", place)
    return RunFolder.of(recipe)


def test_runs_are_where_the_environment_says(place: str, folder: RunFolder, recipe: Recipe, home: Path) -> None:
    assert folder.url == f"{place}/small"
    assert folder.name == "small"
    folder.claim(recipe)
    assert RunFolder(folder.url).facts["digest"] == recipe.digest()
    assert folder.path == (Path(place) / "small" if place.startswith("/") else home / "runs" / "small")


def test_by_default_they_are_in_the_state_folder(recipe: Recipe, home: Path) -> None:
    assert RunFolder.of(recipe).url == str(home / "runs" / "small")


def test_a_place_that_cannot_be_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOTFORGE_RUNS", "s3://me:secret@bucket")
    with pytest.raises(RecipeError, match=r"SLOTFORGE_RUNS: s3://bucket: credentials.*AWS_SECRET_ACCESS_KEY") as caught:
        RunFolder.of(recipe)
    assert "secret@" not in str(caught.value)


def test_a_changed_recipe_under_an_existing_name_names_the_fields(folder: RunFolder, recipe: Recipe) -> None:
    folder.claim(recipe)
    folder.claim(recipe)
    other = recipe.model_copy(update={"seed": 7, "train": recipe.train.model_copy(update={"batch_size": 8})})
    with pytest.raises(RecipeError, match=r"seed: 0 there, 7 here; train.batch_size: 16 there, 8 here.*--fresh"):
        folder.claim(other)


def test_facts_are_added_to(folder: RunFolder) -> None:
    assert folder.facts == {}
    folder.note(a=1, b=2)
    folder.note(b=3)
    assert folder.facts == {"a": 1, "b": 3}


def test_a_run_put_aside_is_whole_and_its_name_is_free(folder: RunFolder, recipe: Recipe) -> None:
    with Lease(folder):
        for number in (1, 2):
            folder.claim(recipe)
            folder.note(attempt=number)
            folder.checkpoints.write("000000004-a/manifest.json", b"{}")
            aside = folder.put_aside()
            assert folder.facts == {}
            assert aside.name == f"small~{number}"
            assert aside.facts["digest"] == recipe.digest()
            assert read_json(aside.storage, "run.json")["attempt"] == number
            assert aside.checkpoints.read("000000004-a/manifest.json") == b"{}"
        assert {file.name.partition("/")[0] for file in folder.storage.files()} == {"leases"}
    with Lease(folder) as again:
        assert again.number == 2  # numbers go on


def test_a_run_half_put_aside_is_still_the_old_one(
    folder: RunFolder, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one must never find the old one's checkpoints."""
    folder.claim(recipe)
    folder.checkpoints.write("000000004-a/manifest.json", b"{}")
    kind, move = type(folder.storage), type(folder.storage).move

    def once(*arguments: str) -> None:
        move(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "move", once)
    with pytest.raises(KeyboardInterrupt):
        folder.put_aside()
    assert folder.facts["digest"] == recipe.digest()
    monkeypatch.setattr(kind, "move", move)
    folder.put_aside()
    assert folder.facts == {}
    assert folder.checkpoints.files() == []
