"""The same training loop without Ray, DeepSpeed, MLflow and checkpoints: the baseline of what the service costs."""

from orchestration.assembly import Data, build_model, training_stream
from orchestration.engine import PlainEngine
from orchestration.recipe import Recipe
from orchestration.schedule import Schedule
from orchestration.worker import Hook, train
from slot_models import SlotAutoencoder


def train_bare(recipe: Recipe, data: Data, hooks: tuple[Hook, ...] = (), device: str = "cpu") -> SlotAutoencoder:
    """Trains a recipe in this process, from its first step to its last."""
    model = build_model(recipe)
    engine = PlainEngine(
        model,
        clip_norm=recipe.train.clip_norm,
        precision=recipe.parallel.precision,
        device=device,
    )
    with training_stream(recipe, data.train, model.noise_shapes()) as stream:
        background = recipe.evaluate.background_slots
        train(engine, stream, Schedule(recipe.train), background_slots=background, hooks=hooks)
    return model
