"""What a recipe trains: its model, and the streams of its training and held-out sets."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestration.recipe import Recipe
from pipelines import Cache, Index, Plan, Purpose, Sources, read_index
from pipelines.mixture import Order
from pipelines.noise import generator
from pipelines.sets import Place, Sets, mixture
from pipelines.stream import Stream
from pipelines.transforms import Augmentation
from slot_models import SlotAutoencoder, build_autoencoder


@dataclass(frozen=True)
class Data:
    """Where a run's shards are."""

    train: Place
    eval: Place


def build_model(recipe: Recipe) -> SlotAutoencoder:
    """The recipe's model, initialised from its seed."""
    words = generator(recipe.seed, Purpose.WEIGHTS).integers(2**63)
    with torch.random.fork_rng(devices=[]):  # torch's initialisers draw from the global generator alone
        torch.manual_seed(int(words))
        return build_autoencoder(**recipe.model.model_dump())


def sources_of(recipe: Recipe) -> Sources:
    """What reads a recipe's shards."""
    return Sources(tries=recipe.data.tries, timeout=recipe.data.timeout, allow_pipe=recipe.data.allow_pipe)


def training_order(recipe: Recipe, place: Place) -> Order:
    """Which samples of the training set each step sees."""
    sources = sources_of(recipe)
    if isinstance(place, Sets) and len(place) > 1:
        return mixture(place, sources, batch_size=recipe.train.batch_size, seed=recipe.seed, **_shape(recipe))
    return _plan(recipe, read_index(place, sources), recipe.train.batch_size)


def training_stream(
    recipe: Recipe, place: Place, noise: Mapping[str, tuple[int, ...]], rank: int = 0, world: int = 1, **options: Any
) -> Stream:
    """A rank's part of the training set, with the noise that the model wants of it."""
    return Stream(
        training_order(recipe, place),
        str(place),
        rank=rank,
        world=world,
        micro_batch=recipe.train.micro_batch,
        seed=recipe.seed,
        noise=noise,
        augment=_augmentation(recipe),
        bad_limit=recipe.data.bad_samples,
        sources=sources_of(recipe),
        cache=_cache(recipe),
        decode_workers=recipe.data.decode_workers,
        **options,
    )


def evaluation_batches(recipe: Recipe, place: Place, rank: int = 0, world: int = 1) -> tuple[Stream, int]:
    """A rank's part of the held-out set, and the number of steps that cover it once."""
    sources = sources_of(recipe)
    index = read_index(place, sources)
    plan = _plan(recipe, index, min(recipe.evaluate.batch_size, index.num_samples))
    stream = Stream(
        plan,
        str(place),
        rank=rank,
        world=world,
        micro_batch=recipe.train.micro_batch,
        seed=recipe.seed,
        noise={},
        with_masks=bool(index.about.get("masks")),
        bad_limit=recipe.data.bad_samples,
        sources=sources,
        cache=_cache(recipe),
        decode_workers=recipe.data.decode_workers,
    )
    return stream, plan.steps_per_epoch


def _plan(recipe: Recipe, index: Index, batch_size: int) -> Plan:
    return Plan(index, batch_size=batch_size, seed=recipe.seed, **_shape(recipe))


def _shape(recipe: Recipe) -> dict[str, int]:
    return {"lanes": recipe.data.lanes, "window": recipe.data.window}


def _augmentation(recipe: Recipe) -> Augmentation | None:
    wish = recipe.data.augment
    return Augmentation(0.5 if wish.flip else 0.0, wish.crop or (1.0, 1.0)) if wish else None


def _cache(recipe: Recipe) -> Cache | None:
    """This node's cache: in the user's own folder, since it may hold what only this user can read."""
    limit = int(recipe.data.cache.gigabytes * 10**9)
    folder = recipe.data.cache.folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "slotforge"
    return Cache(Path(folder).expanduser(), limit) if limit else None
