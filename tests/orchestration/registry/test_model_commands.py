"""slotforge evaluate, promote, rollback: what they say and do, over real packages in a real store."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from registering import IMAGES, NAME, client_of, finish, named, silent, uri_of, worsened
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from orchestration.assembly import Data
from orchestration.cli import app
from orchestration.recipe import Recipe
from orchestration.registry.held_out import HeldOut
from orchestration.registry.loading import recipe_of
from orchestration.registry.promote import CHAMPION, PREVIOUS, holder
from orchestration.registry.trained import Trained
from orchestration.runs.folder import RunFolder


def slotforge(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def write_checkpoint(folder: RunFolder, steps: int, weights: dict[str, Tensor]) -> None:
    """As the ranks write it: weights by name, and a manifest with the digests."""
    path = folder.path / "checkpoints" / f"{steps:09d}-00000000"
    path.mkdir(parents=True)
    save_file({f"weight/{name}": value for name, value in weights.items()}, path / "part-00000.safetensors")
    digest = hashlib.sha256((path / "part-00000.safetensors").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"steps": steps, "files": {"part-00000.safetensors": digest}}))


class World:
    """A store where run ``good`` is champion, run ``bad`` came after it, and both have a checkpoint."""

    def __init__(self, home: Path, recipe: Recipe, data: Data) -> None:
        self.home, self.data, self.trained = home, data, worsened(recipe, 0.0)
        for name, trained in (("good", self.trained), ("bad", worsened(recipe, 0.2))):
            decision = finish(recipe, name, data, trained, metric="reconstruction")
            assert decision.champion == (name == "good"), decision.reason
            write_checkpoint(RunFolder.of(named(recipe, name, data)), 12, dict(trained.weights))

    def aliases(self) -> tuple[str | None, str | None]:
        client = client_of(self.home)
        return holder(client, NAME, CHAMPION), holder(client, NAME, PREVIOUS)


@pytest.fixture(scope="module")
def world(recipe: Recipe, data: Data, tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLOTFORGE_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # as mlflow.set_tracking_uri leaves it
        return World(home, recipe, data)


@pytest.fixture(autouse=True)
def at_home(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOTFORGE_HOME", str(world.home))


def test_a_run_and_its_model_have_the_same_figures_each_time(world: World) -> None:
    run, model = slotforge("evaluate", "good", "--json"), slotforge("evaluate", f"models:/{NAME}@champion", "--json")
    of_run, of_model = json.loads(run.stdout), json.loads(model.stdout)
    assert (of_run.pop("model"), of_model.pop("model")) == ("run good", f"{NAME} version 1")
    assert of_run == of_model
    assert slotforge("evaluate", "good", "--json").stdout == run.stdout
    assert of_run["images"] == 30
    figures = of_run["slots"]["4"]
    held_out = HeldOut.of(recipe_of(f"models:/{NAME}/1", uri_of(world.home)))
    with silent() as progress:
        scores = held_out.score({seed: world.trained.finder(seed=seed) for seed in (0, 1, 2)}, progress, "")
    for name, value in scores[0].evaluation().metrics().items():
        if name != "count_error_of_best_constant":
            assert figures[name]["value"] == pytest.approx(value, rel=1e-9)
            assert figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"]
    seeds = [found.evaluation().means["reconstruction"] for found in scores.values()]
    assert figures["reconstruction"]["seeds"] == pytest.approx(seeds, rel=1e-9)
    assert len(set(seeds)) == 3
    assert figures["reconstruction"]["spread"] == pytest.approx(np.std(seeds, ddof=1), rel=1e-9)


def test_several_numbers_of_slots(world: World) -> None:
    told = slotforge("evaluate", f"models:/{NAME}/1", "--slots", "3,4,6")
    for expected in ("3 slots", "4 slots", "6 slots", "fg_ari", "count_correlation", "±", "percentile bootstrap"):
        assert expected in told.stdout
    figures = json.loads(slotforge("evaluate", f"models:/{NAME}/1", "--slots", "6", "--json").stdout)["slots"]
    assert figures.keys() == {"6"}
    with torch.inference_mode():
        six = world.trained.finder(6)(torch.from_numpy(IMAGES))
        four = world.trained.finder()(torch.from_numpy(IMAGES))
    assert six["masks"].shape == (3, 6, 10, 10)
    assert not torch.equal(six["slots"][:, :4], four["slots"])
    for wrong in ("five", "0", "4,,"):
        assert f"--slots {wrong}" in slotforge("evaluate", f"models:/{NAME}/1", "--slots", wrong, code=2).stderr


def test_a_learned_initial_value_for_each_slot_allows_one_number(recipe: Recipe) -> None:
    attention = recipe.model.attention.model_copy(update={"initial": "per_slot"})
    trained = Trained(recipe.model.model_copy(update={"attention": attention}), 0, {})
    with pytest.raises(ValueError, match="6 slots: this model learned an initial value for each of its 4 slots"):
        trained.finder(6)
    with pytest.raises(ValueError, match="slots: 1, and 1 of them for background"):
        Trained(recipe.model, 1, {}).finder(1)


def test_other_shards_than_the_recipes_own(world: World) -> None:
    own = json.loads(slotforge("evaluate", "good", "--json").stdout)
    other = json.loads(slotforge("evaluate", "good", "--json", "--shards", str(world.data.train)).stdout)
    assert (own["images"], other["images"]) == (30, 200)
    assert own["held_out"] != other["held_out"]
    assert "/nowhere/index.json: not there" in slotforge("evaluate", "good", "--shards", "/nowhere", code=2).stderr


def test_promote_decides_again_and_rollback_goes_back(world: World) -> None:
    assert world.aliases() == ("1", None)
    refused = slotforge("promote", "bad", code=1).stderr
    assert f"{NAME} version 2 is not champion: reconstruction" in refused
    assert "of version 1 on the same 30 images" in refused
    assert world.aliases() == ("1", None)
    loss = ("--set", "registry.tolerated_loss=1.0")
    assert (
        "registry.floors.fg_ari"
        in slotforge("promote", "bad", *loss, "--set", "registry.floors={fg_ari: 1.0}", code=1).stderr
    )
    assert f"{NAME} version 2 is champion" in slotforge("promote", f"models:/{NAME}/2", *loss).stdout
    assert world.aliases() == ("2", "1")
    assert "it is the champion already" in slotforge("promote", "bad").stdout
    assert "where the last decision put them" in slotforge("promote", "bad", "--check").stdout

    assert "version 1 is champion again, version 2 is previous" in slotforge("rollback", NAME).stdout
    assert world.aliases() == ("1", "2")
    client_of(world.home).set_registered_model_alias(NAME, CHAMPION, "2")
    told = slotforge("promote", f"models:/{NAME}@{CHAMPION}", "--check", code=1).stderr
    assert "champion is version 2, the last decision says version 1" in told
    assert slotforge("promote", "good").exit_code == 0  # better than the one that a hand put there
    assert world.aliases() == ("1", "2")
    slotforge("promote", "good", "--check")


def test_the_end_of_a_run_does_not_undo_a_rollback(world: World, recipe: Recipe) -> None:
    again = finish(recipe, "bad", world.data, worsened(recipe, 0.2), metric="reconstruction", tolerated_loss=1.0)
    assert (again.version, again.champion) == ("2", False)
    assert len(client_of(world.home).search_model_versions(f"name = '{NAME}'")) == 2  # registered once


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("evaluate", "nothing"), "nothing: there is no such run, recipe or model; name a run in"),
        (("evaluate", "clevr6"), "clevr6: its run clevr6 has not been started; slotforge train clevr6"),
        (("evaluate", f"models:/{NAME}/9"), "Model Version (name=gated, version=9) not found"),
        (("evaluate", f"models:/{NAME}"), "this is not a model of the registry; write models:/name@champion"),
        (("evaluate", "good", "--set", "train.steps=0"), "train.steps: 0 is not valid"),
        (("promote", "nothing"), "there is no such run, recipe or model"),
        (("evaluate", "good", "--set", "model.num_slots=5"), "model.num_slots: 4 there, 5 here"),
        (("evaluate", f"models:/{NAME}/1", "--set", "model.num_slots=5"), "the model was trained by its recipe"),
        (("rollback", "nobody"), "nobody: there is no such registered model"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: tuple[str, ...], said: str) -> None:
    assert said in slotforge(*arguments, code=2).stderr


def test_a_run_that_is_not_there_yet(world: World, recipe: Recipe, tmp_path: Path) -> None:
    begun = named(recipe, "begun", world.data)
    (tmp_path / "begun.yaml").write_text(begun.yaml())
    RunFolder.of(begun).claim(begun)
    path = str(tmp_path / "begun.yaml")
    assert "it has no checkpoint yet" in slotforge("evaluate", path, code=2).stderr
    assert "it is not registered" in slotforge("promote", path, code=2).stderr
    assert (
        "another recipe (train.steps: 12 there, 99 here)"
        in slotforge("evaluate", path, "--set", "train.steps=99", code=2).stderr
    )
    write_checkpoint(RunFolder.of(begun), 4, dict(world.trained.weights))
    write_checkpoint(RunFolder.of(begun), 8, dict(worsened(recipe, 0.5).weights))
    later: dict[str, Any] = json.loads(slotforge("evaluate", path, "--json").stdout)
    (damaged,) = RunFolder.of(begun).path.glob("checkpoints/000000008-*/part-00000.safetensors")
    damaged.write_bytes(b"damaged")
    before: dict[str, Any] = json.loads(slotforge("evaluate", path, "--json").stdout)
    error = [told["slots"]["4"]["reconstruction"]["value"] for told in (before, later)]
    assert error[0] < error[1]
    assert damaged.is_file()  # a look at a run changes nothing there
