"""MLflow: a run's curves, once each, and what explains them; by one writer, the driver, and off the training path."""

import logging
import os
from typing import TYPE_CHECKING, Any

# Set before MLflow is imported: it would phone home, and its own lines and progress bars would break ours.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from orchestration.tracking.address import store_uri, tracking_uri

if TYPE_CHECKING:
    from orchestration.tracking.tracker import Tracker, is_absent

for noisy in ("mlflow.store.db.utils", "mlflow.pyfunc", "mlflow.tracking._model_registry.client", "alembic"):
    logging.getLogger(noisy).setLevel(logging.WARNING)  # tables created, examples validated: not news to a user

__all__ = ["Tracker", "is_absent", "store_uri", "tracking_uri"]


def __getattr__(name: str) -> Any:
    """What needs MLflow, when it is asked for: MLflow takes seconds to import, the address nothing."""
    if name in ("Tracker", "is_absent"):
        from orchestration.tracking import tracker

        return getattr(tracker, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
