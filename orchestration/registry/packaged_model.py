"""The registered model: what MLflow stores, loads and serves. Models from code: nothing is pickled.

This file and slot_models travel with the model; it knows neither recipes nor Ray nor DeepSpeed.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray
from safetensors.torch import load_file

from slot_models import ObjectFinder, SlotOutput, build_autoencoder

AT_ONCE = 32
"""Images that the model sees at a time: what a call needs beside its result stays bounded."""


class PackagedModel(PythonModel):
    """uint8 images [N, H, W, 3], 8 to 2048 pixels a side -> masks, keep, slots, count and more: see ObjectFinder.

    Attributes:
        finder: the same as a plain torch module.
    """

    # MLflow takes an annotation of model_input for a schema and warns where there is none; ours is the signature.
    _skip_type_hint_validation = True
    finder: ObjectFinder

    def load_context(self, context: PythonModelContext) -> None:
        facts = json.loads(Path(context.artifacts["facts"]).read_text())
        with torch.random.fork_rng(devices=[]):  # initial values are drawn, and overwritten at once
            model = build_autoencoder(**facts["model"])
        model.load_state_dict(load_file(context.artifacts["weights"]))
        self.finder = ObjectFinder(model, facts["model"]["image_size"], facts["background_slots"])

    @property
    def image_size(self) -> int:
        """Pixels a side that the model was trained on."""
        return self.finder.image_size

    @property
    def background_slots(self) -> int:
        """Kept slots that hold no object."""
        return self.finder.background_slots

    @torch.inference_mode()
    def predict(  # type: ignore[no-untyped-def]
        self, context: PythonModelContext | None, model_input, params: dict[str, Any] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Finds the objects.

        Args:
            model_input: uint8 [N, H, W, 3].

        Returns:
            What ObjectFinder says, as arrays; masks and reconstruction at the images' size.

        Raises:
            ValueError: the images are not uint8 [N, H, W, 3], or a side is out of range.
        """
        images = _tensor(model_input)
        parts = [self.finder(images[start : start + AT_ONCE]) for start in range(0, max(len(images), 1), AT_ONCE)]
        return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8]) -> SlotOutput:
        """What the model itself says, as tensors at its own size, with each slot's picture."""
        return self.finder.look(_tensor(images))


def _tensor(images: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(images))  # a copy: what is given may not be written to


mlflow.models.set_model(PackagedModel())
