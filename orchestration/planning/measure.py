"""What a plan measures, on this machine's CPU, since it cannot compute it: activations, times, a sample's bytes."""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from orchestration.assembly import build_model
from orchestration.data_section import ScenesSection
from orchestration.engine import PlainEngine
from orchestration.kept_memory import keep_memory
from orchestration.planning.cost import ModelSize
from orchestration.planning.scaling import PERSISTENT
from orchestration.recipe import Recipe, RecipeError
from orchestration.schedule import Schedule
from orchestration.worker import StepReport, reconstruction_error, train
from pipelines.stream import MicroBatch
from slot_models import SlotAutoencoder, build_autoencoder

SCENES_DRAWN = 16


@dataclass(frozen=True)
class StepTime:
    """Seconds of one sample's part of a step; samples in a micro batch, and steps, that it was measured with."""

    sample_seconds: float
    micro_batch: int
    steps: int


def model_size(recipe: Recipe) -> ModelSize:
    """Counts a recipe's model without making it.

    Raises:
        RecipeError: the model's parts do not fit each other, or need a package that is not there.
    """
    try:
        with torch.device("meta"):
            module = build_autoencoder(**recipe.without_weights().model.model_dump())
    except (ValueError, ImportError) as error:
        raise RecipeError(f"model: {error}") from error
    parameters = list(module.parameters())
    persistent = module.state_dict().keys()
    trained = [parameter.numel() for parameter in parameters if parameter.requires_grad]
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        trained=sum(trained),
        tensors=len(trained),
        large=sum(values for values in trained if values >= PERSISTENT),
        buffer_bytes=sum(
            buffer.numel() * buffer.element_size() for name, buffer in module.named_buffers() if name in persistent
        ),
    )


def saved_bytes(recipe: Recipe, model: SlotAutoencoder, samples: int) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one micro batch: the activations.

    Storages are counted once, and neither weights nor buffers. What a kernel needs for itself comes on top.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    micro, schedule = synthetic_batch(recipe, model, samples), Schedule(recipe.train)
    last = schedule.steps - 1  # the gate decides
    bf16 = recipe.parallel.precision == "bf16"
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = model.train()(
            micro.images,
            micro.slot_noise,
            micro.gate_noise,
            micro.input_noise,
            weight=micro.weight,
            temperature=schedule.temperature(last),
            stage=schedule.stage(last),
        )
        penalty = schedule.keep_weight(last) * output.keep.mean(dim=1)
        loss = (reconstruction_error(output) + penalty + output.auxiliary).mean()
    total = sum(kept.values())
    torch.autograd.backward(loss)
    model.zero_grad()
    return total


def activation_bytes(recipe: Recipe) -> tuple[float, float]:
    """Bytes of activations at no sample, and for each sample more: a line through one and two samples."""
    recipe = recipe.without_weights()
    model = build_model(recipe)
    one, two = (saved_bytes(recipe, model, samples) for samples in (1, 2))
    return float(2 * one - two), float(two - one)


def step_time(recipe: Recipe, budget: float) -> StepTime:
    """Times the training loop itself, with the real model on made-up images, on this machine's CPU.

    Micro batches grow up to train.micro_batch as long as three steps of them fit into what is left of the budget.

    Args:
        budget: seconds; it is passed where even a few samples take longer.
    """
    recipe = recipe.without_weights()
    keep_memory()  # as a rank does; this process goes on so
    began, samples = time.perf_counter(), 1
    largest = min(recipe.train.micro_batch, recipe.train.batch_size)
    engine = PlainEngine(build_model(recipe), clip_norm=recipe.train.clip_norm, precision=recipe.parallel.precision)
    best = _timed(recipe, engine, samples)
    while samples < largest:
        following = min(4 * samples, largest)
        guess = 3 * best.sample_seconds * following
        if time.perf_counter() - began + guess > budget:
            break
        samples = following
        best = _timed(recipe, engine, samples)
    return best


def scene_bytes(scenes: ScenesSection) -> float | None:
    """Bytes of a rendered sample in its shard, of a few; None where the renderer is not installed."""
    from orchestration.prepare import renderer
    from pipelines.scenes import render_shard

    with tempfile.TemporaryDirectory() as folder:
        try:
            shard = render_shard(Path(folder), renderer(scenes), scenes.seed, 0, SCENES_DRAWN)
        except ImportError:
            return None
        except ValueError as error:
            raise RecipeError(f"data.scenes: {error}") from error
    return shard.bytes / SCENES_DRAWN


def _timed(recipe: Recipe, engine: PlainEngine, samples: int) -> StepTime:
    """The faster of a run's two last steps, after one that is not counted."""
    assert isinstance(engine.module, SlotAutoencoder)
    reports: list[StepReport] = []
    batches = _OneBatch(synthetic_batch(recipe, engine.module, samples))
    schedule = Schedule(recipe.train.model_copy(update={"steps": max(3, recipe.train.steps)}))
    train(engine, batches, schedule, start=schedule.steps - 3, hooks=(reports.append,))
    return StepTime(min(report.seconds for report in reports[1:]) / samples, samples, len(reports) - 1)


@dataclass
class _OneBatch:
    """The same micro batch at every step."""

    micro: MicroBatch
    waited: float = 0.0

    def batch_size(self, step: int) -> int:
        return len(self.micro.weight)

    def step(self, step: int) -> Sequence[MicroBatch]:
        return [self.micro]


def synthetic_batch(recipe: Recipe, model: SlotAutoencoder, samples: int) -> MicroBatch:
    """Images and noise of the right shapes: times and sizes do not depend on what is in them."""
    generator = torch.Generator().manual_seed(0)
    size, shapes = recipe.model.image_size, model.noise_shapes()

    def noise(name: str) -> Tensor | None:
        return torch.randn(samples, *shapes[name], generator=generator) if name in shapes else None

    values = {
        "images": torch.rand(samples, 3, size, size, generator=generator) * 2 - 1,
        "weight": torch.ones(samples),
        "slot_noise": noise("slots"),
        "gate_noise": noise("gate"),
        "input_noise": noise("inputs"),
        "num_objects": torch.full((samples,), -1),
        "masks": None,
        "ids": torch.arange(samples),
        "places": torch.arange(samples),
    }
    return MicroBatch(**{field.name: values.get(field.name) for field in dataclasses.fields(MicroBatch)})  # type: ignore[arg-type]
