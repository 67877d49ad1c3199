"""A trained model as data: its parts and its weights, put together by our code alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from orchestration.model_section import ModelSection
from orchestration.recipe import Recipe
from slot_models import ObjectFinder, build_autoencoder

WEIGHTS, FACTS, RECIPE = "weights.safetensors", "facts.json", "recipe.yaml"
"""Files of a packaged model, in its folder artifacts."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A model's parts and weights. Nothing of it is code.

    Fields:
        model: the recipe's section; pretrained weights are not fetched again, they are among the weights.
        background_slots: kept slots that hold no object.
        weights: fp32, by parameter and buffer.
    """

    model: ModelSection
    background_slots: int
    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, recipe: Recipe, weights: Mapping[str, Tensor]) -> Self:
        return cls(recipe.without_weights().model, recipe.evaluate.background_slots, weights)

    @classmethod
    def read(cls, folder: Path, name: str) -> Self:
        """From a packaged model's files, by safetensors and JSON: nothing that lies there is run.

        Args:
            name: of the model, for errors.

        Raises:
            ValueError: a file is missing, or is not what it should be.
        """
        try:
            facts = json.loads((folder / FACTS).read_text())
            model = ModelSection.model_validate_json(json.dumps(facts["model"]))
            background = int(facts["background_slots"])
            weights = load_file(folder / WEIGHTS)
        except (OSError, ValueError, TypeError, KeyError, ValidationError, SafetensorError) as error:
            raise ValueError(f"{name}: this is not a model that slotforge packed ({_one_line(error)})") from error
        if getattr(model.encoder, "pretrained", False):
            model = model.model_copy(update={"encoder": model.encoder.model_copy(update={"pretrained": False})})
        return cls(model, background, weights)

    def facts(self) -> dict[str, Any]:
        """Plain values, for the file FACTS."""
        return {"model": self.model.model_dump(mode="json"), "background_slots": self.background_slots}

    def finder(self, num_slots: int | None = None, seed: int = 0) -> ObjectFinder:
        """The model as a module, in evaluation mode.

        Args:
            num_slots: K; as it was trained by default.
            seed: keys the fixed noise of the initial slots; 0 is what a registered model has.

        Raises:
            ValueError: the parts have another number of slots, or do not fit the weights.
        """
        slots = self.model.num_slots if num_slots is None else num_slots
        if slots != self.model.num_slots and self.model.attention.initial == "per_slot":
            raise ValueError(
                f"{slots} slots: this model learned an initial value for each of its {self.model.num_slots} slots "
                "(model.attention.initial: per_slot), so it has no other number; evaluate it with that one, or train "
                "with initial: shared"
            )
        if slots <= self.background_slots:
            raise ValueError(
                f"slots: {slots}, and {self.background_slots} of them for background; take more than those"
            )
        parts = self.model.model_copy(update={"num_slots": slots}).model_dump()
        parts["attention"]["seed"] = seed
        with torch.random.fork_rng(devices=[]):  # initial values are drawn, and overwritten at once
            model = build_autoencoder(**parts)
        try:
            model.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            raise ValueError(f"the weights are not those of the model's parts ({_one_line(error)})") from error
        return ObjectFinder(model, self.model.image_size, self.background_slots)

    def reconstructs_as(self, other: "Trained") -> bool:
        """Whether reconstruction errors can be compared: both draw images of one size, or features of one backbone."""

        def target(model: ModelSection) -> tuple[Any, ...]:
            encoder = model.encoder
            return model.image_size, *((encoder.name, encoder.final_norm) if encoder.kind == "vit" else ())

        return target(self.model) == target(other.model)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
