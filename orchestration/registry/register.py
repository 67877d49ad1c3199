"""What the end of a run does with its model: into the registry, and through the gate, once."""

import numpy as np
from mlflow import MlflowClient
from numpy.typing import NDArray
from rich.progress import Progress

from orchestration.recipe import Recipe
from orchestration.registry.held_out import HeldOut
from orchestration.registry.loading import trained as trained_of
from orchestration.registry.lock import PromotionError
from orchestration.registry.package import package
from orchestration.registry.promote import Decision, decided, promote
from orchestration.registry.record import Contender
from orchestration.registry.trained import Trained
from orchestration.scores import Scores
from orchestration.tracking import Tracker


def register(
    recipe: Recipe,
    tracker: Tracker,
    trained: Trained,
    scores: Scores,
    held_out: HeldOut,
    example: NDArray[np.uint8],
    progress: Progress,
) -> Decision:
    """Registers a run's final model and puts it to the gate. What was decided before stands, a rollback too.

    Args:
        scores: of the model on the held-out set.
        example: uint8 [N, H, W, 3], the input example.
    """
    client, name = tracker.client, recipe.registered_model
    version = package(recipe, trained, tracker, example)
    if known := decided(client, name, version):
        return known
    candidate = Contender(name, version, trained, scores, held_out.digest)
    return submit(candidate, recipe, client, held_out, tracker.uri, progress)


def submit(
    candidate: Contender, recipe: Recipe, client: MlflowClient, held_out: HeldOut, tracking: str, progress: Progress
) -> Decision:
    """Puts a version to its recipe's gate, the champion scored on the same held-out set.

    Raises:
        PromotionError: nothing is decided.
        DataError, NotFiniteError: as HeldOut.score.
    """

    def champion(version: str) -> Contender:
        try:
            trained = trained_of(f"models:/{candidate.name}/{version}", tracking)
            finder = trained.finder()
        except ValueError as error:
            raise PromotionError(f"the champion, version {version}, cannot be compared with: {error}") from error
        scores = held_out.score({"it": finder}, progress, f"evaluating the champion, version {version}")
        return Contender(candidate.name, version, trained, scores["it"], candidate.held_out)

    return promote(client, candidate, recipe.registry, champion)
