"""Scenes rendered here: pure functions from (seed, shard, row) to images with masks and factors."""

from pipelines.scenes.render import render_shard
from pipelines.scenes.scenes import Renderer, Scenes
from pipelines.scenes.tetrominoes import Tetrominoes

__all__ = ["Renderer", "Scenes", "Tetrominoes", "render_shard"]
