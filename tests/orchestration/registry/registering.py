"""Runs of the small recipe that come to an end: their models are registered in a real store, without training."""

import io
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from orchestration.assembly import Data, build_model
from orchestration.recipe import Recipe, parse_recipe
from orchestration.registry.held_out import HeldOut
from orchestration.registry.promote import Decision
from orchestration.registry.register import register
from orchestration.registry.trained import Trained
from orchestration.runs.folder import RunFolder
from orchestration.tracking import Tracker

IMAGES = np.random.Generator(np.random.Philox(key=[1, 2])).integers(0, 256, (3, 10, 10, 3), dtype=np.uint8)
NAME = "gated"


def silent() -> Progress:
    return Progress(console=Console(file=io.StringIO()))


def client_of(home: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(uri_of(home), registry_uri=uri_of(home))


def uri_of(home: Path) -> str:
    return f"sqlite:///{home / 'mlflow.db'}"


def named(recipe: Recipe, run: str, data: Data, **registry: Any) -> Recipe:
    """The recipe of a run of this name on these shards, with a gate."""
    fields = recipe.model_dump(mode="json")
    data_section = {"train": str(data.train), "eval": str(data.eval)}
    return parse_recipe({**fields, "name": run, "data": data_section, "registry": {"model": NAME, **registry}})


def worsened(recipe: Recipe, by: float) -> Trained:
    """The recipe's untrained model, with what its decoder paints shifted: its reconstruction gets worse, evenly."""
    weights = {name: value.clone() for name, value in build_model(recipe).state_dict().items()}
    weights["decoder.output.bias"] += by
    return Trained.of(recipe, weights)


def finish(recipe: Recipe, run: str, data: Data, trained: Trained, **registry: Any) -> Decision:
    """What the end of a run does."""
    recipe = named(recipe, run, data, **registry)
    folder = RunFolder.of(recipe)
    folder.claim(recipe)
    held_out = HeldOut.of(recipe)
    with silent() as progress:
        scores = held_out.score({"it": trained.finder()}, progress, "")["it"]
        return register(recipe, Tracker(recipe, folder), trained, scores, held_out, IMAGES[:1], progress)


def expected(trained: Trained, images: Any) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return trained.finder()(torch.from_numpy(images))
