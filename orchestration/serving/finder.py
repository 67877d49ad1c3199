"""A registered model, ready to find objects in images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestration.serving.found import Found


class Finder:
    """Runs a packaged model over images, a batch at a time.

    Args:
        packaged: what `registry.load` gives.
        batch: images that the model sees at once.
    """

    def __init__(self, packaged: Any, batch: int = 32) -> None:
        self._packaged, self._batch = packaged, batch
        self.side: int = packaged.image_size

    @classmethod
    def of(cls, model: "ModelName", batch: int = 32) -> "Finder":
        """Of a model in the registry. Raises as `registry.loading.load` does."""
        from orchestration.registry.loading import load

        return cls(load(model.uri, model.tracking, weights_only=model.weights_only), batch)

    def find(self, images: NDArray[np.uint8]) -> list[Found]:
        """What is in each image. images: uint8 [N, S, S, 3]."""
        found: list[Found] = []
        for start in range(0, len(images), self._batch):
            batch = images[start : start + self._batch]
            outputs = self._packaged.predict(None, batch)
            drawn = outputs.get("reconstruction")
            for number, image in enumerate(batch):
                found.append(
                    Found(
                        image=image,
                        objects=int(outputs["count"][number]),
                        keep=outputs["keep"][number],
                        keep_probability=outputs["keep_probability"][number],
                        masks=outputs["masks"][number],
                        drawn=None if drawn is None or drawn.shape != batch.shape else drawn[number],
                    )
                )
        return found


@dataclass(frozen=True)
class ModelName:
    """Which model, and how it is loaded. Travels to workers.

    Fields:
        uri: models:/name/version or models:/name@alias; with weights_only also the folder of a packaged model.
        tracking: MLflow's URI.
        weights_only: run nothing that is packed with it; our own code puts it together.
    """

    uri: str
    tracking: str
    weights_only: bool = False

    def pinned(self) -> "ModelName":
        """With the version that an alias stands for now, so that everybody loads the same.

        Raises:
            ValueError: the URI is of another kind.
            MlflowException: there is no such model or alias.
        """
        if self.weights_only and not self.uri.startswith("models:/"):
            return replace(self, uri=str(Path(self.uri).absolute()))
        from mlflow import MlflowClient

        from orchestration.registry.loading import version_of

        name, version = version_of(self.uri, MlflowClient(self.tracking, registry_uri=self.tracking))
        return replace(self, uri=f"models:/{name}/{version}")
