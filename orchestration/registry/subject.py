"""What a command was told to look at: a run, a registered model, or a packaged model in a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from orchestration.recipe import Recipe, load_recipe
from orchestration.recipe_files import recipe_names
from orchestration.registry.loading import recipe_of, trained, version_of
from orchestration.registry.package import registered_version
from orchestration.registry.trained import Trained
from orchestration.runs.checkpoints import DamagedCheckpointError, committed
from orchestration.runs.folder import RunFolder, runs_home
from orchestration.tracking import store_uri, tracking_uri


class SubjectError(Exception):
    """There is nothing of that name; the message says what there is."""


@dataclass(frozen=True)
class Subject:
    """A model that a command was told to look at.

    Fields:
        label: for people.
        recipe: that it was trained by, with the command's overrides.
        tracking: MLflow's URI.
        name, version: in the registry; the version is None where it is not registered.
    """

    label: str
    recipe: Recipe
    tracking: str
    name: str
    version: str | None
    _folder: RunFolder | None = None
    _uri: str = ""

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.tracking, registry_uri=self.tracking)

    def trained(self) -> Trained:
        """Its parts and weights: of a run, the newest checkpoint's. No code of a packaged model is run.

        Raises:
            SubjectError: the run has no checkpoint yet.
            ValueError: these are not a packaged model's files.
        """
        if self._folder is None:
            return trained(self._uri, self.tracking)
        for checkpoint in reversed(committed(self._folder.checkpoints)):
            try:
                return Trained.of(self.recipe, checkpoint.weights())
            except DamagedCheckpointError:  # or pruned this moment; the run itself puts damaged ones aside
                continue
        raise SubjectError(f"{self.label}: it has no checkpoint yet; wait for its first, or train on")


def subject_of(text: str, overrides: Sequence[str], tracking: str | None) -> Subject:
    """Finds what RUN|MODEL stands for.

    Args:
        text: models:/name@alias, models:/name/version, a packaged model's folder, the name of a run, or a recipe (name
            or path), which stands for its run.
        overrides: fields of the recipe, "section.field=value".
        tracking: MLflow's URI; the recipe's, or the default store, by default.

    Raises:
        SubjectError: there is nothing of that name.
        RecipeError: the recipe is wrong, or the run has another.
        ValueError, MlflowException: there is no such model.
    """
    if text.startswith("models:/") or (Path(text) / "artifacts").is_dir():
        return _packaged(text, overrides, tracking)
    if text in recipe_names() or Path(text).suffix in {".yaml", ".yml"}:
        recipe = load_recipe(text, overrides)
        folder = RunFolder.of(recipe)
        if not folder.facts:
            raise SubjectError(f"{text}: its run {recipe.name} has not been started; slotforge train {text}")
        folder.claim(recipe)  # raises where the run has another recipe
        return _run(recipe, folder, tracking)
    folder = RunFolder((runs_home() / text).url)
    if "/" in text or not folder.facts:
        raise SubjectError(
            f"{text}: there is no such run, recipe or model; name a run in {runs_home().url}, a recipe "
            f"({', '.join(recipe_names())}), or models:/name@champion"
        )
    known = folder.facts.get("mlflow", {})
    if not known:
        raise SubjectError(f"{text}: this run has not come to MLflow yet, so its recipe is not known; name its recipe")
    recipe = _logged_recipe(known["uri"], known["run"], overrides)
    folder.claim(recipe)  # raises where an override makes it another
    return _run(recipe, folder, tracking)


def _packaged(text: str, overrides: Sequence[str], tracking: str | None) -> Subject:
    uri = store_uri(tracking)
    if not text.startswith("models:/"):
        recipe = _read(text, uri, overrides)
        return Subject(text, recipe, uri, recipe.registered_model, None, _uri=text)
    name, version = version_of(text, MlflowClient(uri, registry_uri=uri))
    exact = f"models:/{name}/{version}"
    return Subject(f"{name} version {version}", _read(exact, uri, overrides), uri, name, version, _uri=exact)


def _read(uri: str, tracking: str, overrides: Sequence[str]) -> Recipe:
    recipe = recipe_of(uri, tracking, overrides)
    if overrides and recipe.identity() != recipe_of(uri, tracking).identity():
        raise SubjectError(
            f"--set {' '.join(overrides)}: the model was trained by its recipe and stays as it is; set fields of "
            "registry or parallel, and give other images with --shards"
        )
    return recipe


def _run(recipe: Recipe, folder: RunFolder, tracking: str | None) -> Subject:
    known = folder.facts.get("mlflow", {})
    uri = store_uri(tracking) if tracking else known.get("uri") or tracking_uri(recipe)
    name, version = recipe.registered_model, None
    if known:
        version = registered_version(MlflowClient(uri, registry_uri=uri), name, known["run"])
    return Subject(f"run {recipe.name}", recipe, uri, name, version, _folder=folder)


def _logged_recipe(uri: str, run: str, overrides: Sequence[str]) -> Recipe:
    path = mlflow.artifacts.download_artifacts(run_id=run, artifact_path="recipe.yaml", tracking_uri=uri)
    return load_recipe(path, overrides)
