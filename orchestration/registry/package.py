"""A trained model into the registry: pyfunc from code, weights as safetensors, and what it takes to run it."""

import importlib.metadata
import json
import tempfile
from pathlib import Path

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec
from numpy.typing import NDArray
from safetensors.torch import save_file

import slot_models
from orchestration.model_section import ModelSection
from orchestration.recipe import Recipe
from orchestration.registry.trained import FACTS, RECIPE, WEIGHTS, Trained
from orchestration.tracking import Tracker, is_absent

REQUIREMENTS = ("mlflow", "torch", "einops", "numpy", "safetensors")
OF_BACKBONES = ("timm", "torchvision")


def package(recipe: Recipe, trained: Trained, tracker: Tracker, example: NDArray[np.uint8]) -> str:
    """Registers a run's model, once.

    Args:
        example: uint8 [N, H, W, 3], the input example.

    Returns:
        Its version, the one there is where the run has one.
    """
    version = registered_version(tracker.client, recipe.registered_model, tracker.run_id)
    return version or _log(recipe, trained, tracker, example)


def registered_version(client: MlflowClient, name: str, run_id: str) -> str | None:
    """The version that a run registered; None where there is none."""
    try:
        versions = client.search_model_versions(f"name = '{name}'")
    except MlflowException as error:
        if not is_absent(error):
            raise
        return None
    return next((str(version.version) for version in versions if version.run_id == run_id), None)


def signature(model: ModelSection) -> ModelSignature:
    """What the packaged model takes and gives; -1 is any number. Images of 8 to 2048 pixels a side."""
    slots, any_size = model.num_slots, (-1, -1, -1, 3)
    outputs: list[ColSpec | TensorSpec] = [
        TensorSpec(np.dtype(np.float32), (-1, slots, -1, -1), "masks"),
        TensorSpec(np.dtype(bool), (-1, slots), "keep"),
        TensorSpec(np.dtype(np.float32), (-1, slots), "keep_probability"),
        TensorSpec(np.dtype(np.float32), (-1, slots, model.slot_dim), "slots"),
        TensorSpec(np.dtype(np.int64), (-1,), "count"),
    ]
    if model.encoder.kind != "vit":  # whose features are reconstructed, not images
        outputs.append(TensorSpec(np.dtype(np.uint8), any_size, "reconstruction"))
    return ModelSignature(inputs=Schema([TensorSpec(np.dtype(np.uint8), any_size)]), outputs=Schema(outputs))


def requirements(model: ModelSection) -> list[str]:
    """Pinned, without a local version tag such as +cpu: other machines' package indexes do not have it."""
    names = (*REQUIREMENTS, *(OF_BACKBONES if model.encoder.kind == "vit" else ()))
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in names]


def _log(recipe: Recipe, trained: Trained, tracker: Tracker, example: NDArray[np.uint8]) -> str:
    mlflow.set_tracking_uri(tracker.uri)
    mlflow.set_registry_uri(tracker.uri)
    with tempfile.TemporaryDirectory() as temporary, mlflow.start_run(run_id=tracker.run_id):
        folder = Path(temporary)
        save_file(dict(trained.weights), folder / WEIGHTS)
        (folder / FACTS).write_text(json.dumps(trained.facts(), indent=1))
        (folder / RECIPE).write_text(recipe.yaml())
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("packaged_model.py")),
            artifacts={
                "weights": str(folder / WEIGHTS),
                "facts": str(folder / FACTS),
                "recipe": str(folder / RECIPE),
            },
            code_paths=[str(Path(slot_models.__file__).parent)],
            signature=signature(trained.model),
            input_example=example,
            pip_requirements=requirements(trained.model),
            registered_model_name=recipe.registered_model,
            metadata={"recipe_digest": recipe.digest()},
        )
    return str(logged.registered_model_version)
