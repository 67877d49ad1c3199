"""Where a run's MLflow is."""

import os
from pathlib import Path

from orchestration.credentials import in_url
from orchestration.recipe import Recipe, RecipeError, state_home

VARIABLE = "MLFLOW_TRACKING_URI"


def tracking_uri(recipe: Recipe) -> str:
    """Of a recipe's run; see store_uri."""
    return store_uri(recipe.tracking.uri, "tracking.uri")


def store_uri(uri: str | None, field: str = "--tracking-uri") -> str:
    """One absolute URI for everybody: Ray's workers change directory, and a relative one would be a store of theirs.

    Args:
        uri: what was asked for; None takes $MLFLOW_TRACKING_URI, and without it a store in the state folder.
        field: that it stands in, for the error.

    Raises:
        RecipeError: it is relative, or holds a password or a token.
    """
    if uri is None:
        uri, field = os.environ.get(VARIABLE), VARIABLE
    if not uri:
        state_home().mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{state_home() / 'mlflow.db'}"
    if in_url(uri):
        raise RecipeError(
            f"{field}: it holds a password or a token, which would be noted with the run; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
        )
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        path = uri.removeprefix("sqlite:///")
        raise RecipeError(f"{field}: {uri!r} is relative; write sqlite:///{Path(path).absolute()}")
    return uri
