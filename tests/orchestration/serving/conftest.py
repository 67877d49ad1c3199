"""A registered model, untrained: what is found does not matter here, only that it is the model's."""

import numpy as np
import pytest
import torch

from orchestration.recipe import parse_recipe
from orchestration.registry.package import package
from orchestration.registry.trained import Trained
from orchestration.runs.folder import RunFolder
from orchestration.serving.finder import Finder, ModelName
from orchestration.tracking import Tracker
from slot_models import build_autoencoder

FIELDS = {
    "name": "served",
    "data": {"scenes": {"pieces": [1, 3], "grid": 5, "cell": 4, "train": 200, "eval": 30, "per_shard": 50}},
    "model": {
        "image_size": 20,
        "num_slots": 4,
        "slot_dim": 16,
        "encoder": {"channels": 8, "strides": [2, 1]},
        "attention": {"hidden_dim": 16},
        "gate": {"keep_bias": 0.0},
        "decoder": {"channels": 8, "layers": 2, "kernel": 3, "patch": 2},
    },
    "train": {"steps": 12, "batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 2, "keep_weight": 0.01},
}
SIDE = 20


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tracking URI of a registry that holds models:/slotforge-served@champion."""
    home = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLOTFORGE_HOME", str(home))
        recipe = parse_recipe(FIELDS)
        folder = RunFolder.of(recipe)
        folder.claim(recipe)
        tracker = Tracker(recipe, folder)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = build_autoencoder(**recipe.model.model_dump()).state_dict()
        weights = {name: 30 * weight if name.startswith("gate") else weight for name, weight in weights.items()}
        example = np.zeros((1, SIDE, SIDE, 3), dtype=np.uint8)
        version = package(recipe, Trained.of(recipe, weights), tracker, example)
        tracker.client.set_registered_model_alias(recipe.registered_model, "champion", version)
        return tracker.uri


@pytest.fixture(scope="session")
def model(store: str) -> ModelName:
    return ModelName("models:/slotforge-served/1", store)


@pytest.fixture(scope="session")
def finder(model: ModelName) -> Finder:
    return Finder.of(model)


def photo(number: int, height: int = SIDE, width: int = SIDE) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Blocks of colour, so that slots differ; uint8 [height, width, 3]."""
    random = np.random.Generator(np.random.Philox(key=[number, 7]))
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    return coarse[rows][:, columns]
