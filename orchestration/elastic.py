"""Ray Train with restarts that lose no step where they can be foreseen.

Ray restarts all workers at a resize, without notice. Here a resize, and a node that is about to go, are foreseen: the
ranks are asked to save first, and leave by themselves. Ray Train's own engine does the rest; what is added goes in by
its policies and callbacks, which are internal interfaces of the pinned version.
"""

import logging
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from orchestration.events import Kind
from orchestration.mailbox import Leaving
from orchestration.wording import counted

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0  # that the mailbox may take
KILLED_FOR_MEMORY = "low on memory"  # what Ray says of a worker that its memory monitor killed


UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)
"""Each starts an actor, which is seconds of a core. The shards do not come from Ray Data, and Ray itself removes the
placement group of a controller that dies."""


class NoBarrier:
    """In the place of the actor at which ranks meet that call ray.train.report: ours do not, and it takes a process and
    half a percent of a core for as long as they train."""

    def options(self, **_: Any) -> "NoBarrier":
        return self

    def remote(self, **_: Any) -> str:
        return "no barrier"  # as a handle, which the ranks are given


class Trainer(DataParallelTrainer):
    """Ray Train's, with the policies of this module.

    Args:
        mailbox: of orchestration.mailbox.
        final: errors that a restart would only repeat.
    """

    def __init__(self, *arguments: Any, mailbox: Any, final: tuple[type[Exception], ...], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._mailbox, self._final = mailbox, final

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        restarts: Any = self.run_config.failure_config
        scaling: Any = self.scaling_config
        parts["failure_policy"] = Restarts(restarts, self._mailbox, self._final)
        elastic = scaling.elasticity_enabled
        parts["scaling_policy"] = SavedResizes(scaling, self._mailbox) if elastic else OneSize(scaling)
        callbacks = [callback for callback in parts["callbacks"] if not isinstance(callback, UNUSED)]
        parts["callbacks"] = [*callbacks, Notices(self._mailbox, "cuda" if scaling.use_gpu else "cpu")]
        return super()._initialize_and_run_controller(**parts)


class OneSize(FixedScalingPolicy):
    """Waits for its placement group, which an autoscaler sees: it needs no request through an actor besides."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class SavedResizes(ElasticScalingPolicy):
    """Resizes by asking the ranks to save and leave; they start anew at the size that there is room for then.

    Where the save fails they stay as they are: a resize is worth no step.
    """

    def __init__(self, scaling_config: ScalingConfig, mailbox: Any) -> None:
        super().__init__(scaling_config)
        self._mailbox = mailbox

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Not on nodes that are dead or about to go: Ray counts both for a while, and then waits for them."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - _draining()  # type: ignore[no-untyped-call]
        return super()._count_possible_workers(
            {node: resources for node, resources in reserved_resources.items() if node in alive}
        )

    def make_decision_for_running_worker_group(self, *state: Any, **status: Any) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(*state, **status)
        if isinstance(decision, ResizeDecision):
            self._mailbox.resize.remote(
                time.time(), f"room for {counted(decision.num_workers, 'worker')}: saving to resize"
            )
        return NoopDecision()


class Restarts(DefaultFailurePolicy):
    """Who leaves as asked is no failure; failures count only while no new step comes between them."""

    def __init__(self, failure_config: FailureConfig, mailbox: Any, final: tuple[type[Exception], ...]) -> None:
        super().__init__(failure_config)
        self._mailbox = mailbox
        # By name: the controller, which makes this anew, would import all of a rank's code before it starts workers.
        self._final = frozenset(_name(kind) for kind in final)
        self._steps = 0

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        self._mailbox.mark.remote("detected", time.time())
        if not isinstance(training_failed_error, WorkerGroupError):
            return super().make_decision(training_failed_error)
        errors = training_failed_error.worker_failures
        if any(self._is_final(error) for error in errors.values()):
            return FailureDecision.RAISE
        leaving = [str(error) for error in errors.values() if isinstance(error, Leaving)]
        if leaving:
            self._happened("restart", f"workers start anew: {leaving[0]}")
            return FailureDecision.RETRY
        if any(KILLED_FOR_MEMORY in str(error) for error in errors.values()):
            limit = _answer(self._mailbox.out_of_memory.remote())
            if limit is not None:
                self._happened("memory", f"out of memory: micro batches of {limit} from now on")
                return FailureDecision.RETRY
        steps = _answer(self._mailbox.steps.remote())
        if steps is not None and steps > self._steps:
            self._steps, self._worker_group_failures = steps, 0
        rank, error = min(errors.items(), key=lambda entry: (not isinstance(entry[1], RayActorError), entry[0]))
        self._happened("failure", f"rank {rank} failed: {_first_line(error)}; going on from the last checkpoint")
        return super().make_decision(training_failed_error)

    def _is_final(self, error: Exception) -> bool:
        return any(_name(kind) in self._final for kind in type(error).__mro__)

    def _happened(self, kind: Kind, text: str) -> None:
        self._mailbox.happened.remote(time.time(), kind, text)


class Notices(ControllerCallback, WorkerGroupCallback):
    """Tells the mailbox how restarts go, and the ranks of nodes that are about to go.

    Ray Train's own watcher of such nodes is an actor for each start of the workers, and is switched off.
    """

    def __init__(self, mailbox: Any, device: str) -> None:
        self._mailbox, self._device = mailbox, device
        self._nodes: set[str] = set()
        self._warned: set[str] = set()

    def after_controller_start(self, train_run_context: Any) -> None:
        """In the controller's process."""
        groups: Any = worker_group
        states: Any = state
        groups.SynchronizationActor = NoBarrier()
        states._shutdown_sync_actor = lambda barrier: None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        going = (_draining() & self._nodes) - self._warned
        if going:
            self._warned |= going
            nodes = ", ".join(sorted(node[:8] for node in going))
            self._mailbox.happened.remote(time.time(), "preemption", f"node {nodes} is about to go: saving first")
            self._mailbox.ask.remote("leave")

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._mailbox.mark.remote("down", time.time())

    def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
        """The workers' processes are there; their imports, all at once."""
        self._nodes = {worker.metadata.node_id for worker in workers}
        self._mailbox.starting.remote()
        self._mailbox.mark.remote("scheduled", time.time())
        ray.get([worker.execute_async(_import_stack, self._device) for worker in workers])
        self._mailbox.mark.remote("imported", time.time())
        return {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._mailbox.mark.remote("grouped", time.time())
        self._mailbox.happened.remote(time.time(), "workers", f"training on {counted(len(worker_group), 'worker')}")


def _draining() -> set[str]:
    """Nodes that are about to go."""
    return set(ray._private.state.state.get_draining_nodes())


def _import_stack(device: str) -> None:
    """What a rank needs of Python."""
    import orchestration.rank  # noqa: F401
    from orchestration.engine import import_deepspeed

    import_deepspeed(device)


def _answer(reference: Any) -> int | None:
    """The mailbox's; None where it takes too long. The failure then counts as one without a new step: an answer to a
    later one makes that good, and what was asked for is done once the mailbox comes to it."""
    try:
        answer: int | None = ray.get(reference, timeout=ANSWER_SECONDS)
    except GetTimeoutError:
        logger.warning("the mailbox has not answered in %.0f s; deciding without it", ANSWER_SECONDS)
        return None
    return answer


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200] if lines else ''}"
