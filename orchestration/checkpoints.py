"""Moved to orchestration.runs."""

from orchestration.runs.checkpoints import (
    DamagedCheckpointError,
    Points,
    committed,
    newest_valid,
    prune,
    put_aside,
    restore,
)
from orchestration.runs.saver import Saver, new_token

__all__ = [
    "DamagedCheckpointError",
    "Points",
    "Saver",
    "committed",
    "new_token",
    "newest_valid",
    "prune",
    "put_aside",
    "restore",
]
