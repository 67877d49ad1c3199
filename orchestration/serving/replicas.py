"""The Ray Serve deployment: replicas of a registered model that answer requests in batches.

Ray Serve keeps the replicas alive, spreads requests over them and forms the batches. Its HTTP proxy is not used: it
reads a whole request, of any length, before a replica sees any of it; app.py stands in its place.
"""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import numpy as np
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import LoggingConfig

from orchestration.kept_memory import keeping_memory
from orchestration.serving.answers import Answer, Work, answered
from orchestration.serving.app import UnavailableError
from orchestration.serving.calls import Calls, LostError
from orchestration.serving.finder import Finder, ModelName
from orchestration.serving.found import Found
from orchestration.serving.images import Limits, Pixels

_CALLS = 2  # at a time of each replica: one whose images are decoded while the model looks at the other's
_BATCH_SECONDS = 0.002  # to wait for a batch to fill: what comes while the model runs is the next batch anyway
_STATUS_SECONDS = 1.0  # that a count of the replicas is good for
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


@serve.deployment(logging_config=_QUIET, graceful_shutdown_timeout_s=10, health_check_period_s=2)
class Replica:
    """One copy of the model. Images of requests that come together are seen together.

    Args:
        model: pinned.
        batch: images that the model sees at once.
        threads: of torch.
    """

    def __init__(self, model: ModelName, limits: Limits, batch: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._model, self._limits = model.uri, limits
        self._finder = Finder.of(model, batch)
        self._find.set_max_batch_size(batch)  # type: ignore[attr-defined]
        self._forward = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._images = ThreadPoolExecutor(2, thread_name_prefix="images")  # bounds what is decoded at a time
        self._finder.find(np.zeros((1, self._finder.side, self._finder.side, 3), dtype=np.uint8))  # warm

    async def answer(self, works: list[Work]) -> list[Answer]:
        """An answer to each."""
        return await asyncio.gather(*(self._answer(work) for work in works))

    async def _answer(self, work: Work) -> Answer:
        return await answered(
            work,
            model=self._model,
            side=self._finder.side,
            limits=self._limits,
            find=self._find,
            pool=self._images,
        )

    @serve.batch(batch_wait_timeout_s=_BATCH_SECONDS)
    async def _find(self, images: list[Pixels]) -> list[Found]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._forward, self._finder.find, np.stack(images))


class Replicas:
    """Replicas on the connected Ray, to be asked from this process. Blocks until the first answers.

    Args:
        count: replicas.
        others: as of `Replica`.

    Raises:
        RuntimeError: a replica could not load the model.
    """

    def __init__(self, model: ModelName, limits: Limits, *, count: int, batch: int, threads: int) -> None:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # deaths are told below, once
        self._name = f"slotforge-{uuid4().hex[:8]}"  # several services may share a cluster
        deployment = Replica.options(  # type: ignore[attr-defined]
            num_replicas=count,
            max_ongoing_requests=max(_CALLS, batch),  # room for a whole batch of calls, or Ray Serve warns
            ray_actor_options={"num_cpus": threads, "runtime_env": {"env_vars": keeping_memory()}},
        )
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config=_QUIET)
        application = deployment.bind(model, limits, batch, threads)
        self._handle = serve.run(application, name=self._name, route_prefix=None, logging_config=_QUIET)
        self._calls = Calls(self._call, batch=batch, at_once=_CALLS * count)
        self._counted = (0, -_STATUS_SECONDS)  # replicas, when

    async def answer(self, work: Work) -> Answer:
        """Asks a replica, and another one if it dies.

        Raises:
            UnavailableError: there is none, or they die one after the other.
        """
        return await self._calls.answer(work)

    async def replicas(self) -> int:
        """How many are running; known anew each second."""
        if time.monotonic() - self._counted[1] >= _STATUS_SECONDS:
            self._counted = (await asyncio.to_thread(self._running), time.monotonic())
        return self._counted[0]

    def stop(self) -> None:
        """Ends the replicas, once they have answered what they are at; others' services stay."""
        serve.delete(self._name)

    async def _call(self, works: list[Work]) -> list[Answer]:
        try:
            answers: list[Answer] = await self._handle.answer.remote(works)
        except RayActorError as error:
            raise LostError(f"a replica died ({type(error).__name__})") from error
        except DeploymentUnavailableError as error:
            raise UnavailableError("no replica could be started; try again later") from error
        return answers

    def _running(self) -> int:
        application = serve.status().applications.get(self._name)
        if application is None:
            return 0
        states = [deployment.replica_states for deployment in application.deployments.values()]
        return sum(count for of_one in states for state, count in of_one.items() if state == "RUNNING")
