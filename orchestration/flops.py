"""How much a GPU computes of what it could."""

from dataclasses import dataclass

import torch

from orchestration.assembly import build_model
from orchestration.planning.measure import synthetic_batch
from orchestration.recipe import Recipe
from orchestration.worker import reconstruction_error

# Dense bf16 with fp32 accumulation, from NVIDIA's data sheets, by a part of the device's name; the first that fits.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations.

    Fields:
        image: of one image's part of a step, forward and backward.
        peak: a second, that the GPU can do in bf16; None where that is not known.
    """

    image: float
    peak: float | None

    def rates(self, images_per_second: float) -> dict[str, float]:
        """By their names in MLflow, from what one GPU does. mfu is the share of the peak (Chowdhery et al. 2022)."""
        done = self.image * images_per_second
        return {"throughput/tflops_per_gpu": done / 1e12} | ({"throughput/mfu": done / self.peak} if self.peak else {})


def training_flops(recipe: Recipe) -> float:
    """Of one image, forward and backward, counted once on the CPU: matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode  # brings triton, a second where it is installed

    recipe = recipe.without_weights()
    model = build_model(recipe).train()
    micro = synthetic_batch(recipe, model, 1)
    with FlopCounterMode(display=False) as counter:
        output = model(micro.images, micro.slot_noise, micro.gate_noise, micro.input_noise, weight=micro.weight)
        torch.autograd.backward((reconstruction_error(output) + output.auxiliary).sum())
    return float(counter.get_total_flops())


def peak_flops(name: str) -> float | None:
    """Of a GPU, by its name; None where it is not known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)
