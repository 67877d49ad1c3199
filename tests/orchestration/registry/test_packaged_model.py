"""What is loaded back is what was registered: by MLflow, by our own code alone, and as a program of torch.export."""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
import pytest
import torch
from registering import IMAGES, expected, finish, uri_of, worsened
from typer.testing import CliRunner

from orchestration.assembly import Data
from orchestration.cli import app
from orchestration.model_section import ModelSection
from orchestration.recipe import Recipe
from orchestration.registry.loading import load, load_module, recipe_of
from orchestration.registry.package import requirements, signature
from orchestration.registry.trained import Trained


class Registered(NamedTuple):
    """A champion's URI, the state folder of its store, and what was registered."""

    uri: str
    home: Path
    trained: Trained


@pytest.fixture(scope="module")
def registered(recipe: Recipe, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    home = tmp_path_factory.mktemp("registered")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLOTFORGE_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # as mlflow.set_tracking_uri leaves it
        trained = worsened(recipe, 0.0)
        return Registered(finish(recipe, "first", data, trained).uri, home, trained)


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """A file with another content for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(before)


def test_what_is_loaded_back_is_what_was_registered(registered: Registered) -> None:
    uri, home, trained = registered
    assert uri == "models:/gated@champion"
    images = np.tile(IMAGES, (12, 2, 3, 1))  # 36 of 20 x 30: more than one batch, and another size
    wanted = expected(trained, images)
    loaded = mlflow.pyfunc.load_model(uri)
    ways = [
        loaded.predict(images),
        load(uri, uri_of(home)).predict(None, images),
        load(uri, uri_of(home), weights_only=True).predict(None, images),
    ]
    for found in ways:
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value.numpy(), rtol=0, atol=1e-6)
    at_its_size = expected(trained, IMAGES)
    for name, value in loaded.predict(IMAGES).items():
        np.testing.assert_array_equal(value, at_its_size[name].numpy())
    with torch.inference_mode():
        for module in (load_module(uri, uri_of(home)), loaded.unwrap_python_model().finder):
            torch.testing.assert_close(module(torch.from_numpy(IMAGES)), at_its_size, rtol=0, atol=0)
    assert loaded.predict(IMAGES[:0])["masks"].shape == (0, 4, 10, 10)


def test_its_outputs_are_those_of_its_signature(registered: Registered) -> None:
    uri = registered.uri
    loaded = mlflow.pyfunc.load_model(uri)
    found = loaded.predict(np.tile(IMAGES, (1, 2, 3, 1)))
    declared = {entry.name: entry for entry in loaded.metadata.signature.outputs.inputs}
    assert found.keys() == declared.keys()
    for name, entry in declared.items():
        assert found[name].dtype == entry.type
        assert all(wanted in (-1, size) for size, wanted in zip(found[name].shape, entry.shape, strict=True)), name
    for wrong in (IMAGES.astype(np.float32), IMAGES[0], IMAGES[:, :5]):
        with pytest.raises((ValueError, mlflow.exceptions.MlflowException)):
            loaded.predict(wrong)


def test_a_model_of_features_declares_no_picture() -> None:
    vit = ModelSection.model_validate_json('{"encoder": {"kind": "vit"}, "decoder": {"kind": "mlp"}}')
    assert "reconstruction" not in [entry.name for entry in signature(vit).outputs.inputs]
    assert {line.partition("==")[0] for line in requirements(vit)} >= {"timm", "torchvision"}


def test_nothing_is_pickled_and_requirements_are_pinned(registered: Registered) -> None:
    home = registered.home
    packed = [path for path in (home / "mlflow-artifacts").rglob("*") if path.is_file()]
    packed = [path for path in packed if path.parent.name != "__pycache__"]  # left by loading back
    assert {"weights.safetensors", "packaged_model.py", "object_finder.py"} <= {path.name for path in packed}
    assert {path.suffix for path in packed} <= {".safetensors", ".json", ".yaml", ".yml", ".py", ".txt", "", ".png"}
    (pins,) = [path.read_text().split() for path in packed if path.name == "requirements.txt"]
    assert {pin.partition("==")[0] for pin in pins} == {"mlflow", "torch", "einops", "numpy", "safetensors"}
    assert all("==" in pin and "+" not in pin for pin in pins)


def test_weights_only_runs_nothing_that_is_packed(registered: Registered) -> None:
    uri, home, trained = registered
    (planted,) = (home / "mlflow-artifacts").rglob("packaged_model.py")
    evil = f"open({str(home / 'ran')!r}, 'w')\n".encode() + planted.read_bytes()
    with changed(planted, evil):
        found = load(uri, uri_of(home), weights_only=True).predict(None, IMAGES)
        np.testing.assert_array_equal(found["masks"], expected(trained, IMAGES)["masks"].numpy())
        in_a_folder = load(str(planted.parent), "", weights_only=True).predict(None, IMAGES)
        np.testing.assert_array_equal(in_a_folder["masks"], found["masks"])
        assert not (home / "ran").exists()
        load(uri, uri_of(home))
        assert (home / "ran").exists()  # as it would have


@pytest.mark.parametrize("uri", ["runs:/abc/model", "/tmp/model", "https://example.org/model", "models:/m-0123"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_only_models_of_the_registry_are_loaded(uri: str, weights_only: bool, home: Path) -> None:
    with pytest.raises(ValueError, match="this is not a model of the registry"):
        load(uri, uri_of(home), weights_only=weights_only)


def test_damaged_files_are_told(registered: Registered) -> None:
    uri, home, _ = registered
    artifacts = home / "mlflow-artifacts"
    (facts,), (weights,) = artifacts.rglob("facts.json"), artifacts.rglob("weights.safetensors")
    model = json.loads(facts.read_bytes())["model"]

    def with_model(**fields: Any) -> bytes:
        return json.dumps({"model": model | fields, "background_slots": 0}).encode()

    for path, content, said in (
        (facts, with_model(num_slots="many"), r"not a model that slotforge packed.*num_slots"),
        (facts, with_model(slot_dim=8), "the weights are not those of the model's parts"),
        (facts, b"[]", "not a model that slotforge packed"),
        (weights, weights.read_bytes()[:100], "not a model that slotforge packed"),
    ):
        with changed(path, content), pytest.raises(ValueError, match=said):
            load_module(uri, uri_of(home))
    assert recipe_of(uri, uri_of(home)).name == "first"


def test_pretrained_weights_are_not_fetched_again() -> None:
    section = '{"encoder": {"kind": "vit", "pretrained": true}, "decoder": {"kind": "mlp"}, "image_size": 224}'
    recipe = Recipe.model_validate_json(f'{{"name": "a", "data": {{"train": "a", "eval": "b"}}, "model": {section}}}')
    assert not Trained.of(recipe, {}).facts()["model"]["encoder"]["pretrained"]


def test_an_exported_program_gives_the_same_for_any_batch_and_holds_no_pickle(
    registered: Registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder, store = registered.trained.finder(), uri_of(registered.home)
    command = ["export", registered.uri, "--tracking-uri", store, "--out", str(tmp_path / "model.pt2")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.inference_mode():
        for count in (1, 2, 7):
            images = torch.from_numpy(np.resize(IMAGES, (count, 10, 10, 3)))
            torch.testing.assert_close(program(images), finder(images), rtol=1e-5, atol=1e-6)
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert [content for name, content in contents.items() if name.endswith(".pt")] == [b""]  # where inputs are pickled
    assert not any(str(Path(__file__).parents[3]).encode() in content for content in contents.values())
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("pickle.loads", None)
    again = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(again(images), program(images), rtol=0, atol=0)
