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

from slot_models import SlotOutput, build_autoencoder


class PackagedModel(PythonModel):
    """uint8 images [N, H, W, 3] of the training size -> masks, keep, keep_probability, count, reconstruction."""

    # MLflow takes an annotation of model_input for a schema and warns where there is none; ours is the signature.
    _skip_type_hint_validation = True

    def load_context(self, context: PythonModelContext) -> None:
        facts = json.loads(Path(context.artifacts["facts"]).read_text())
        self.image_size: int = facts["model"]["image_size"]
        self.background_slots: int = facts["background_slots"]
        self.model = build_autoencoder(**facts["model"])
        self.model.load_state_dict(load_file(context.artifacts["weights"]))
        self.model.eval()

    def predict(  # type: ignore[no-untyped-def]
        self, context: PythonModelContext | None, model_input, params: dict[str, Any] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Finds the objects.

        Args:
            model_input: uint8 [N, H, W, 3].

        Returns:
            masks: float32 [N, K, H, W], each slot's share of each pixel.
            keep: bool [N, K], whether the image needs the slot.
            keep_probability: float32 [N, K].
            count: int64 [N], objects found: kept slots less the background's.
            reconstruction: uint8 [N, H, W, 3].

        Raises:
            ValueError: the images are not uint8 [N, H, W, 3] of the training size.
        """
        output = self.run(model_input)
        keep = output.keep > 0.5
        pixels = ((output.reconstruction.clamp(-1, 1) + 1) * 127.5).round().byte()
        return {
            "masks": output.masks_at(self.image_size, self.image_size).numpy(),
            "keep": keep.numpy(),
            "keep_probability": output.keep_probability.numpy(),
            "count": (keep.sum(dim=1) - self.background_slots).clamp(min=0).numpy(),
            "reconstruction": pixels.permute(0, 2, 3, 1).contiguous().numpy(),
        }

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8]) -> SlotOutput:
        """The same as tensors, with each slot's picture."""
        images = np.asarray(images)
        expected = (self.image_size, self.image_size, 3)
        if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.uint8:
            raise ValueError(
                f"images: {images.dtype} {list(images.shape)} is not uint8 [N, {', '.join(map(str, expected))}]"
            )
        pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1  # [N, 3, H, W]
        output: SlotOutput = self.model(pixels)
        return output


mlflow.models.set_model(PackagedModel())
