"""A registered model: what it finds does not matter here, only that it is told as it is."""

import numpy as np
import pytest
import torch
from served import FIELDS, SIDE

from orchestration.recipe import parse_recipe
from orchestration.registry.package import package
from orchestration.registry.trained import Trained
from orchestration.runs.folder import RunFolder
from orchestration.serving.finder import Finder, ModelName
from orchestration.tracking import Tracker
from slot_models import build_autoencoder


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
