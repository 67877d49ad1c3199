"""Renderers: pure functions from (seed, shard, row) to scenes with masks and factors. numpy only."""

from pipelines.scenes.scenes import Scenes
from pipelines.scenes.tetrominoes import Tetrominoes

__all__ = ["Scenes", "Tetrominoes"]
