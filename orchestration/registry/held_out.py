"""A held-out set, and models scored on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress

from orchestration.assembly import evaluation_batches, sources_of
from orchestration.kept_memory import keep_memory
from orchestration.prepare import data_folders
from orchestration.recipe import Recipe
from orchestration.scores import Scores, score
from pipelines import read_index
from pipelines.sets import Place, place_of
from slot_models import ObjectFinder


@dataclass(frozen=True)
class HeldOut:
    """Shards that no model was trained on.

    Fields:
        recipe: how they are read.
        place: where they are.
    """

    recipe: Recipe
    place: Place

    @classmethod
    def of(cls, recipe: Recipe, shards: str | None = None) -> "HeldOut":
        """The recipe's own held-out set, or another by its address."""
        return cls(recipe, data_folders(recipe).eval if shards is None else place_of(shards))

    @property
    def digest(self) -> str:
        """Raises: DataError: there is no index, or it is damaged."""
        return read_index(self.place, sources_of(self.recipe)).digest

    def score(
        self, finders: Mapping[Any, ObjectFinder], progress: Progress, doing: str = "evaluating"
    ) -> dict[Any, Scores]:
        """Each model's scores, in the set's order; on a GPU where the recipe allows it and there is one.

        Images of another size than a model's are resized for it.

        Raises:
            DataError: a shard is missing or damaged.
            NotFiniteError: what a model makes of an image is not finite.
        """
        gpu = self.recipe.parallel.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if gpu else "cpu")
        stream, steps = evaluation_batches(self.recipe, self.place)
        keep_memory()
        bar = progress.add_task(doing, total=read_index(self.place, sources_of(self.recipe)).num_samples)
        with stream:
            scores = score(
                {key: finder.to(device).see for key, finder in finders.items()},
                (micro for step in range(steps) for micro in stream.step(step)),
                background_slots={key: finder.background_slots for key, finder in finders.items()},
                device=device,
                seen=lambda images: progress.advance(bar, images),
            )
        progress.remove_task(bar)
        return scores
