"""A registered model whose versions have a made-up foreground ARI: promotions without weights and images."""

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import mlflow
import numpy as np

from orchestration.recipe import RegistrySection, parse_recipe
from orchestration.registry import promote as promotion
from orchestration.registry.lock import PromotionLock
from orchestration.registry.promote import CHAMPION, PREVIOUS, Decision, holder
from orchestration.registry.record import Contender
from orchestration.registry.trained import Trained
from orchestration.scores import Scores

IMAGES = 60
QUALITY = "quality"


def scores(fg_ari: float) -> Scores:
    noise = np.random.Generator(np.random.Philox(key=[3, round(fg_ari * 1e6)])).normal(0, 0.001, IMAGES)
    objects = np.arange(IMAGES) % 3 + 1
    values = {"fg_ari": fg_ari + noise, "reconstruction": 0.1 - noise}
    return Scores(values, kept=objects, objects=objects, num_slots=4, background_slots=0)


class MadeUp:
    """The quality of a version stands in a tag, so that other processes know it too."""

    def __init__(self, client: mlflow.MlflowClient, name: str) -> None:
        self.client, self.name = client, name
        self.trained = Trained.of(parse_recipe({"name": "a", "data": {"train": "a", "eval": "b"}}), {})

    def add(self, quality: float) -> str:
        tags = {QUALITY: str(quality)}
        version = self.client.create_model_version(self.name, "made:/up", tags=tags, await_creation_for=0)
        return str(version.version)

    def contender(self, version: str) -> Contender:
        quality = float(self.client.get_model_version(self.name, version).tags[QUALITY])
        return Contender(self.name, version, self.trained, scores(quality), "digest of the shards")

    def promote(self, version: str, scored: Callable[[str], Any] = lambda version: None, **gate: Any) -> Decision:
        def champion(version: str) -> Contender:
            scored(version)
            return self.contender(version)

        return promotion.promote(self.client, self.contender(version), RegistrySection(**gate), champion)

    def aliases(self) -> tuple[str | None, str | None]:
        return holder(self.client, self.name, CHAMPION), holder(self.client, self.name, PREVIOUS)


def new(client: mlflow.MlflowClient, name: str) -> MadeUp:
    client.create_registered_model(name)
    return MadeUp(client, name)


# --- what processes of their own run ------------------------------------------------------------------------------


def of(uri: str, name: str) -> MadeUp:
    return MadeUp(mlflow.MlflowClient(uri, registry_uri=uri), name)


def race(uri: str, name: str, version: str, together: Any) -> None:
    """Promotes a version after all have scored the same champion."""
    waited: list[str] = []

    def scored(champion: str) -> None:
        if not waited:
            waited.append(champion)
            together.wait(timeout=240)

    of(uri, name).promote(version, scored)


def die_at_alias(uri: str, name: str, version: str, survived: int) -> None:
    """Promotes a version and is killed -9 as it sets an alias, after so many of them."""
    made = of(uri, name)
    real, calls = made.client.set_registered_model_alias, []

    def dies(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > survived:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)

    made.client.set_registered_model_alias = dies
    made.promote(version)


def hold(uri: str, name: str, seconds: float, said: Any, go_on: Any) -> None:
    """Takes the lock, says so, and says whether it still has it when it may go on."""
    with PromotionLock(of(uri, name).client, name, seconds) as lock:
        said.put("holds")
        go_on.wait(240)
        try:
            lock.check()
            said.put("held")
        except promotion.PromotionError as error:
            said.put(str(error))


def impatient(seconds: float) -> Any:
    """A lock for which a silent holder counts as dead sooner."""
    return partial(PromotionLock, seconds=seconds)
