"""Models out of the registry: as they were packed, or put together by our own code."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient

from orchestration.recipe import Recipe, load_recipe
from orchestration.registry.packaged_model import PackagedModel
from orchestration.registry.trained import RECIPE, Trained
from slot_models import ObjectFinder

_NAMED = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>\d+)|@(?P<alias>[^/@]+))")


def load(uri: str, tracking: str, *, weights_only: bool = False) -> Any:
    """A packaged model.

    Loading one runs the code that is packed with it, so it has to come from the configured registry. With
    ``weights_only`` nothing of it is run: our own code puts the model together from its safetensors and its plain
    description, and it may be a folder too.

    Args:
        uri: models:/name@alias or models:/name/version; with weights_only also a packaged model's folder.
        tracking: MLflow's URI.

    Returns:
        A PackagedModel: predict(None, uint8 [N, H, W, 3]) -> arrays by name; run, image_size, background_slots, finder.

    Raises:
        ValueError: the URI is of another kind; or, with weights_only, the files are not such a model's.
        MlflowException: there is no such model.
    """
    if not weights_only:
        _check(uri)
        _use(tracking)
        return mlflow.pyfunc.load_model(uri).unwrap_python_model()
    packaged = PackagedModel()
    packaged.finder = load_module(uri, tracking)
    return packaged


def load_module(uri: str, tracking: str) -> ObjectFinder:
    """A registered model, or one in a folder, as a plain torch module, put together by our code: uint8 images
    [B, H, W, 3] -> tensors by name. Raises as `load` does.
    """
    return trained(uri, tracking).finder()


def trained(uri: str, tracking: str) -> Trained:
    """A packaged model's parts and weights. Raises as `load` does."""
    with _files(uri, tracking) as folder:
        return Trained.read(folder, uri)


def recipe_of(uri: str, tracking: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a model was packed with.

    Args:
        overrides: "section.field=value".

    Raises:
        RecipeError: it is not one of today.
        ValueError, MlflowException: as `load`.
    """
    with _files(uri, tracking) as folder:
        return load_recipe(str(folder / RECIPE), overrides)


def version_of(uri: str, client: MlflowClient) -> tuple[str, str]:
    """Name and version that a models:/ URI stands for now.

    Raises:
        ValueError: the URI is of another kind.
        MlflowException: there is no such model.
    """
    found = _check(uri)
    name = found["name"]
    if found["version"]:
        return name, str(client.get_model_version(name, found["version"]).version)
    return name, str(client.get_model_version_by_alias(name, found["alias"]).version)


@contextmanager
def _files(uri: str, tracking: str) -> Iterator[Path]:
    """A packaged model's data, without its code."""
    if not uri.startswith("models:/") and (Path(uri) / "artifacts").is_dir():
        yield Path(uri) / "artifacts"
        return
    _check(uri)
    _use(tracking)
    with tempfile.TemporaryDirectory() as folder:
        yield Path(mlflow.artifacts.download_artifacts(f"{uri}/artifacts", dst_path=folder))


def _check(uri: str) -> "re.Match[str]":
    # models:/<id> would be a model that was logged, but never registered
    found = _NAMED.fullmatch(uri)
    if not found:
        raise ValueError(f"{uri}: this is not a model of the registry; write models:/name@champion or models:/name/1")
    return found


def _use(tracking: str) -> None:
    """MLflow resolves models:/ by its global addresses alone."""
    mlflow.set_tracking_uri(tracking)
    mlflow.set_registry_uri(tracking)
