"""The model registry: package a model, register it, and move the alias champion only through the gate."""

import importlib.metadata
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

import slot_models
from orchestration.evaluate import Evaluation, yardstick
from orchestration.recipe import Recipe
from orchestration.tracking import Tracker, is_absent

CHAMPION = "champion"
REQUIREMENTS = ("mlflow", "torch", "einops", "numpy", "safetensors")


@dataclass(frozen=True)
class Registered:
    """A version in the registry.

    Fields:
        name, version: of the model.
        champion: whether it holds the alias.
        reason: why it does, or does not.
    """

    name: str
    version: str
    champion: bool
    reason: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}@{CHAMPION}" if self.champion else f"models:/{self.name}/{self.version}"


def register(
    recipe: Recipe,
    tracker: Tracker,
    weights: Mapping[str, Tensor],
    evaluation: Evaluation,
    held_out_digest: str,
    example: NDArray[np.uint8],
) -> Registered:
    """Registers a run's final model, once, and puts it to the gate.

    Args:
        weights: fp32, by parameter name.
        evaluation: of these weights on the held-out set with this digest.
        example: uint8 [N, H, W, 3], the input example.
    """
    name, client = recipe.registered_model, tracker.client
    version = _version_of(client, name, tracker.run_id)
    if version is None:
        version = _package(recipe, tracker, weights, example)
    metrics = evaluation.metrics()
    for key, value in metrics.items():
        client.set_model_version_tag(name, version, f"eval.{key}", f"{value:.6f}")
    client.set_model_version_tag(name, version, "eval.data", held_out_digest)
    refusal = _refusal(recipe, client, version, metrics, held_out_digest)
    if refusal is None:
        client.set_registered_model_alias(name, CHAMPION, version)
    reason = refusal or "the floors hold, and no champion does better on the same held-out shards"
    client.set_model_version_tag(name, version, "gate", reason)
    return Registered(name, version, refusal is None, reason)


def load(uri: str, tracking: str) -> Any:
    """A packaged model, from the configured registry alone: loading one runs the code that is packed with it.

    Raises:
        ValueError: the URI is not of the registry.
        MlflowException: there is no such model.
    """
    # models:/<id> would be a model that was logged, but never registered
    if not re.fullmatch(r"models:/[^/@]+(/\d+|@[^/@]+)", uri):
        raise ValueError(
            f"--model {uri}: only models of the registry are loaded; write models:/name@{CHAMPION} or models:/name/1"
        )
    mlflow.set_tracking_uri(tracking)
    mlflow.set_registry_uri(tracking)
    return mlflow.pyfunc.load_model(uri).unwrap_python_model()


def _refusal(
    recipe: Recipe, client: MlflowClient, version: str, metrics: Mapping[str, float], held_out_digest: str
) -> str | None:
    """Why a version does not become the champion; None if it does."""
    for key, floor in recipe.registry.floors.items():
        if key not in metrics:
            return f"registry.floors.{key}: the held-out set does not tell {key}; remove the floor or add masks"
        if not metrics[key] >= floor:
            return f"registry.floors.{key}: {metrics[key]:.3f} is below the floor {floor}"
    try:
        champion = client.get_model_version_by_alias(recipe.registered_model, CHAMPION)
    except MlflowException as error:
        if not is_absent(error):
            raise
        return None  # the first one
    measure, sign = yardstick(metrics)
    theirs = champion.tags.get(f"eval.{measure}")
    same_data = champion.tags.get("eval.data") == held_out_digest
    if champion.version == version or theirs is None or not same_data:
        return None
    if sign * metrics[measure] < sign * float(theirs) - 1e-6:
        return f"the champion, version {champion.version}, is better: {measure} {theirs} against {metrics[measure]:.6f}"
    return None


def _version_of(client: MlflowClient, name: str, run_id: str) -> str | None:
    try:
        versions = client.search_model_versions(f"name = '{name}'")
    except MlflowException as error:
        if not is_absent(error):
            raise
        return None
    return next((str(version.version) for version in versions if version.run_id == run_id), None)


def _package(recipe: Recipe, tracker: Tracker, weights: Mapping[str, Tensor], example: NDArray[np.uint8]) -> str:
    model = recipe.model
    size, slots = model.image_size, model.num_slots
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, size, size, 3))]),
        outputs=Schema(
            [
                TensorSpec(np.dtype(np.float32), (-1, slots, size, size), "masks"),
                TensorSpec(np.dtype(bool), (-1, slots), "keep"),
                TensorSpec(np.dtype(np.float32), (-1, slots), "keep_probability"),
                TensorSpec(np.dtype(np.int64), (-1,), "count"),
                TensorSpec(np.dtype(np.uint8), (-1, size, size, 3), "reconstruction"),
            ]
        ),
    )
    facts = {"model": model.model_dump(mode="json"), "background_slots": recipe.evaluate.background_slots}
    mlflow.set_tracking_uri(tracker.uri)
    mlflow.set_registry_uri(tracker.uri)
    with tempfile.TemporaryDirectory() as folder, mlflow.start_run(run_id=tracker.run_id):
        save_file(dict(weights), Path(folder) / "weights.safetensors")
        (Path(folder) / "facts.json").write_text(json.dumps(facts, indent=1))
        (Path(folder) / "recipe.yaml").write_text(recipe.yaml())
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("packaged_model.py")),
            artifacts={
                "weights": f"{folder}/weights.safetensors",
                "facts": f"{folder}/facts.json",
                "recipe": f"{folder}/recipe.yaml",
            },
            code_paths=[str(Path(slot_models.__file__).parent)],
            signature=signature,
            input_example=example,
            pip_requirements=[_pin(package) for package in REQUIREMENTS],
            registered_model_name=recipe.registered_model,
            metadata={"recipe_digest": recipe.digest()},
        )
    return str(logged.registered_model_version)


def _pin(package: str) -> str:
    """Without a local version tag such as +cpu: other machines' package indexes do not have it."""
    return f"{package}=={importlib.metadata.version(package).partition('+')[0]}"
