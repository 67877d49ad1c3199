"""The registry: what is loaded back is what was trained, and the gate decides who is champion. A real store."""

from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from orchestration.assembly import build_model
from orchestration.evaluate import Evaluation
from orchestration.predict import ImageError, predict
from orchestration.recipe import Recipe
from orchestration.registry import Registered, load, register
from orchestration.run_folder import RunFolder
from orchestration.tracking import Tracker
from pipelines.transforms import to_model
from slot_models import SlotCounts

IMAGES = np.random.Generator(np.random.Philox(key=[1, 2])).integers(0, 256, (3, 10, 10, 3), dtype=np.uint8)


def evaluation(fg_ari: float) -> Evaluation:
    return Evaluation(30, {"reconstruction": 0.1, "fg_ari": fg_ari}, SlotCounts(torch.eye(5, dtype=torch.float64)))


def submit(recipe: Recipe, name: str, fg_ari: float, held_out: str = "shards", floor: float = 0.5) -> Registered:
    registry = recipe.registry.model_copy(update={"model": "gated", "floors": {"fg_ari": floor}})
    named = recipe.model_copy(update={"name": name, "registry": registry})
    folder = RunFolder.of(named)
    folder.claim(named)
    tracker = Tracker(named, folder)
    return register(named, tracker, build_model(named).state_dict(), evaluation(fg_ari), held_out, IMAGES[:1])


def test_the_champion_is_whoever_passes_the_gate(recipe: Recipe, home: Path) -> None:
    uri = f"sqlite:///{home / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri, registry_uri=uri)

    def champion() -> str:
        return str(client.get_model_version_by_alias("gated", "champion").version)

    below = submit(recipe, "below", 0.4)
    assert (below.version, below.champion) == ("1", False)
    assert "0.400 is below the floor 0.5" in below.reason
    assert below.uri == "models:/gated/1"

    first = submit(recipe, "first", 0.8)
    assert first.champion
    assert champion() == "2"
    assert submit(recipe, "first", 0.8) == first  # a finished run that is shown again is not registered again

    lost = submit(recipe, "lost", float("nan"))
    assert not lost.champion
    client.delete_model_version("gated", lost.version)

    worse = submit(recipe, "worse", 0.7)
    assert not worse.champion
    assert "version 2, is better" in worse.reason
    assert champion() == "2"

    better = submit(recipe, "better", 0.9)
    assert better.champion
    assert champion() == "5"
    assert client.get_model_version("gated", worse.version).tags["gate"] == worse.reason
    assert client.get_model_version("gated", "5").tags["eval.fg_ari"] == "0.900000"

    # What is loaded back by its alias is what was registered, to the bit.
    served = mlflow.pyfunc.load_model(better.uri).predict(IMAGES)
    with torch.inference_mode():
        expected = build_model(recipe).eval()(to_model(IMAGES))
    np.testing.assert_array_equal(served["masks"], expected.masks.numpy())
    np.testing.assert_array_equal(served["keep"], expected.keep.numpy() > 0.5)
    np.testing.assert_array_equal(served["count"], expected.keep.sum(dim=1).numpy())
    assert served["reconstruction"].dtype == np.uint8

    for wrong in (IMAGES.astype(np.float32), IMAGES[:, :8], IMAGES[0]):
        with pytest.raises((ValueError, mlflow.exceptions.MlflowException)):
            mlflow.pyfunc.load_model(better.uri).predict(wrong)

    files = [path for path in home.rglob("*") if path.suffix in {".pkl", ".pickle", ".pt", ".bin"}]
    assert files == []

    photo = home / "photo.jpg"
    Image.fromarray(np.tile(IMAGES[0], (9, 12, 1))).save(photo)
    (found,) = predict([photo], better.uri, uri, home / "out")
    assert found.overlay.is_file()
    assert found.facts.is_file()
    assert 0 < found.objects <= 4
    (home / "text.png").write_text("no image")
    with pytest.raises(ImageError, match=r"text.png: this is not an image"):
        predict([home / "text.png"], better.uri, uri, home / "out")


@pytest.mark.parametrize("uri", ["runs:/abc/model", "/tmp/model", "https://example.org/model", "models:/m-0123"])
def test_only_models_of_the_registry_are_loaded(uri: str, home: Path) -> None:
    with pytest.raises(ValueError, match="only models of the registry are loaded"):
        load(uri, f"sqlite:///{home / 'mlflow.db'}")
