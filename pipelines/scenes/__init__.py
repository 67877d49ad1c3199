"""Scenes rendered here: pure functions from (seed, index) to images with masks and factors."""

from collections.abc import Mapping
from types import MappingProxyType

from pipelines.scenes.clevr import Clevr
from pipelines.scenes.render import render_shard
from pipelines.scenes.scenes import Renderer, Scenes
from pipelines.scenes.sprites import MultiDSprites
from pipelines.scenes.tetrominoes import Tetrominoes

# The sets by name, each with its published parameters; dataclasses.replace changes some.
RENDERERS: Mapping[str, Renderer] = MappingProxyType(
    {"tetrominoes": Tetrominoes(), "multi-dsprites": MultiDSprites(), "clevr": Clevr()}
)

__all__ = ["RENDERERS", "Clevr", "MultiDSprites", "Renderer", "Scenes", "Tetrominoes", "render_shard"]
