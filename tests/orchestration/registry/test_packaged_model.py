"""What is loaded back is what was registered: by MLflow, by our own code alone, and as a program of torch.export."""

import json
import zipfile
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from registering import IMAGES, client_of, expected, finish, uri_of, worsened

from orchestration.assembly import Data
from orchestration.model_section import ModelSection
from orchestration.recipe import Recipe
from orchestration.registry.export import export
from orchestration.registry.loading import load, load_module, recipe_of
from orchestration.registry.package import requirements, signature
from orchestration.registry.trained import Trained


@pytest.fixture
def registered(recipe: Recipe, data: Data, home: Path) -> tuple[str, Trained]:
    """A champion's URI, and what was registered."""
    trained = worsened(recipe, 0.0)
    return finish(recipe, "first", data, trained).uri, trained


def test_what_is_loaded_back_is_what_was_registered(registered: tuple[str, Trained], home: Path) -> None:
    uri, trained = registered
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


def test_its_outputs_are_those_of_its_signature(registered: tuple[str, Trained]) -> None:
    uri, _ = registered
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


def test_nothing_is_pickled_and_requirements_are_pinned(registered: tuple[str, Trained], home: Path) -> None:
    packed = [path for path in (home / "mlflow-artifacts").rglob("*") if path.is_file()]
    assert {"weights.safetensors", "packaged_model.py", "object_finder.py"} <= {path.name for path in packed}
    assert {path.suffix for path in packed} <= {".safetensors", ".json", ".yaml", ".yml", ".py", ".txt", "", ".png"}
    (pins,) = [path.read_text().split() for path in packed if path.name == "requirements.txt"]
    assert {pin.partition("==")[0] for pin in pins} == {"mlflow", "torch", "einops", "numpy", "safetensors"}
    assert all("==" in pin and "+" not in pin for pin in pins)
    code = "\n".join(path.read_text() for path in packed if path.suffix == ".py")
    assert "orchestration" not in code.replace("orchestration.", "") or "import orchestration" not in code


def test_weights_only_runs_nothing_that_is_packed(registered: tuple[str, Trained], home: Path) -> None:
    uri, trained = registered
    (planted,) = (home / "mlflow-artifacts").rglob("packaged_model.py")
    planted.write_text(f"open({str(home / 'ran')!r}, 'w')\n" + planted.read_text())
    found = load(uri, uri_of(home), weights_only=True).predict(None, IMAGES)
    np.testing.assert_array_equal(found["masks"], expected(trained, IMAGES)["masks"].numpy())
    folder = planted.parent
    np.testing.assert_array_equal(
        load(str(folder), "", weights_only=True).predict(None, IMAGES)["masks"], found["masks"]
    )
    assert not (home / "ran").exists()
    load(uri, uri_of(home))
    assert (home / "ran").exists()  # as it would have


@pytest.mark.parametrize("uri", ["runs:/abc/model", "/tmp/model", "https://example.org/model", "models:/m-0123"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_only_models_of_the_registry_are_loaded(uri: str, weights_only: bool, home: Path) -> None:
    with pytest.raises(ValueError, match="this is not a model of the registry"):
        load(uri, uri_of(home), weights_only=weights_only)


def test_damaged_files_are_told(registered: tuple[str, Trained], home: Path) -> None:
    uri, trained = registered
    (facts,) = (home / "mlflow-artifacts").rglob("facts.json")
    known = json.loads(facts.read_text())
    facts.write_text(json.dumps(known | {"model": known["model"] | {"num_slots": "many"}}))
    with pytest.raises(ValueError, match="not a model that slotforge packed.*num_slots"):
        load_module(uri, uri_of(home))
    facts.write_text(json.dumps(known | {"model": known["model"] | {"slot_dim": 8}}))
    with pytest.raises(ValueError, match="the weights are not those of the model's parts"):
        load_module(uri, uri_of(home))
    facts.write_text(json.dumps(known))
    (weights,) = (home / "mlflow-artifacts").rglob("weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a model that slotforge packed"):
        load_module(uri, uri_of(home))
    assert client_of(home).get_model_version_by_alias("gated", "champion").version == 1
    assert recipe_of(uri, uri_of(home)).name == "first"


def test_pretrained_weights_are_not_fetched_again() -> None:
    section = '{"encoder": {"kind": "vit", "pretrained": true}, "decoder": {"kind": "mlp"}, "image_size": 224}'
    recipe = Recipe.model_validate_json(f'{{"name": "a", "data": {{"train": "a", "eval": "b"}}, "model": {section}}}')
    assert not Trained.of(recipe, {}).facts()["model"]["encoder"]["pretrained"]


def test_an_exported_program_gives_the_same_for_any_batch(recipe: Recipe, tmp_path: Path) -> None:
    finder = worsened(recipe, 0.0).finder()
    export(finder, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.inference_mode():
        for count in (1, 2, 7):
            images = torch.from_numpy(np.resize(IMAGES, (count, 10, 10, 3)))
            torch.testing.assert_close(program(images), finder(images), rtol=0, atol=0)
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        for member in archive.namelist():
            content = archive.read(member)
            assert not zipfile.is_zipfile(archive.open(member)), member  # as torch.save would leave one, with a pickle
            assert not content.startswith(b"\x80"), member  # a pickle's first byte
            assert str(Path(__file__).parents[3]).encode() not in content, member
