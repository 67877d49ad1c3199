"""What a model makes of a few held-out images at a step: what it takes to draw them, on its way to the driver."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save

from orchestration.worker import Micro
from slot_models import SlotCounts, SlotOutput

SCENES = 4


@dataclass(frozen=True, eq=False)
class Glimpse:
    """All of it on the CPU.

    Fields:
        images: uint8 [N, H, W, 3].
        output: of these images; what no picture needs is zero.
        counts: kept slots against objects over the whole set; None where the numbers of objects are unknown.
    """

    images: NDArray[np.uint8]
    output: SlotOutput
    counts: SlotCounts | None

    def to_bytes(self) -> bytes:
        """Safetensors: nobody unpickles it. Half precision is plenty for a picture."""
        output = self.output
        tensors = {"keep": output.keep, "masks": output.masks}
        if output.pictures is not None and output.target.shape[1] == 3:  # features cannot be drawn
            tensors |= {"pictures": output.pictures, "reconstruction": output.reconstruction}
        if output.attention is not None:
            tensors["attention"] = output.attention
        tensors = {name: value.half().contiguous() for name, value in tensors.items()}
        tensors["images"] = torch.from_numpy(self.images)
        if self.counts is not None:
            tensors["confusion"] = self.counts.confusion
            tensors["background_slots"] = torch.tensor(self.counts.background_slots)
        return save(tensors)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Glimpse":
        tensors = load(content)
        found = {name: value.float() if value.dtype == torch.float16 else value for name, value in tensors.items()}
        keep = found["keep"]
        drawn = found.get("reconstruction", torch.zeros(len(keep), 1, 1, 1))
        output = SlotOutput(
            slots=torch.zeros(*keep.shape, 1),
            keep=keep,
            keep_probability=keep,
            masks=found["masks"],
            pictures=found.get("pictures"),
            reconstruction=drawn,
            target=drawn,
            auxiliary=torch.zeros(len(keep)),
            code_tally=None,
            attention=found.get("attention"),
        )
        counts = None
        if "confusion" in found:
            counts = SlotCounts(found["confusion"], int(found["background_slots"]))
        return cls(found["images"].numpy(), output, counts)


class FirstScenes:
    """Keeps the first real images of the first micro batch that it is shown, and what the model makes of them."""

    def __init__(self) -> None:
        self._seen: tuple[NDArray[np.uint8], SlotOutput] | None = None

    def look(self, micro: Micro, output: SlotOutput) -> None:
        """For evaluate's ``look``."""
        if self._seen is not None:
            return
        rows = torch.nonzero(micro.weight > 0).flatten()[:SCENES]
        if len(rows) == 0:
            return
        pixels = ((micro.images[rows].float() + 1) * 127.5).round().clamp(0, 255).byte()  # [N, 3, H, W]
        images = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        kept = {name: value for name, value in output._asdict().items() if value is not None and name != "code_tally"}
        self._seen = (
            images,
            output._replace(
                **{name: value[rows].cpu() for name, value in kept.items()},
                code_tally=None,
            ),
        )

    def glimpse(self, counts: SlotCounts | None) -> Glimpse | None:
        """None where this rank has no image."""
        return Glimpse(*self._seen, counts) if self._seen is not None else None
