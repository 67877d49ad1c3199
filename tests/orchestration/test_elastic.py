"""What is a failure, and when the workers are asked to leave. The system tests show it on real clusters."""

import inspect
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.mailbox import Leaving, Mailbox
from orchestration.worker import DivergedError


class Handle:
    """An actor's handle whose calls are done at once."""

    def __init__(self, box: Mailbox) -> None:
        self.box = box

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.box, name)
        return type("Method", (), {"remote": staticmethod(method)})


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Mailbox:
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    from orchestration import elastic

    monkeypatch.setattr(elastic.ray, "get", lambda value, timeout=None: value)
    return Mailbox()


def restarts(box: Mailbox, limit: int = 2) -> Any:
    from ray.train.v2.api.config import FailureConfig

    from orchestration.elastic import Restarts

    return Restarts(FailureConfig(max_failures=limit), Handle(box), (DivergedError,))


def decide(policy: Any, *errors: Exception) -> str:
    from ray.train.v2.api.exceptions import WorkerGroupError

    return str(policy.make_decision(WorkerGroupError("failed", dict(enumerate(errors)))).value)


def shown(box: Mailbox, step: int) -> None:
    box.show({"when": 1.0, "step": step, "loss": 0.0, "kept": 0.0, "images_per_second": 0.0})


def test_failures_count_only_while_no_step_comes_between_them(box: Mailbox) -> None:
    policy = restarts(box)
    for step in (10, 20, 30, 40):
        shown(box, step)
        assert decide(policy, RuntimeError("lost")) == "RETRY"
    assert decide(policy, RuntimeError("lost")) == "RETRY"
    assert decide(policy, RuntimeError("lost")) == "RAISE"


def test_leaving_as_asked_is_no_failure(box: Mailbox) -> None:
    policy = restarts(box, limit=0)
    for _ in range(5):
        assert decide(policy, Leaving("saved at step 3"), RuntimeError("its peer left")) == "RETRY"
    assert [event.text for event in box.news().events] == ["workers start anew: saved at step 3"] * 5
    assert decide(policy, RuntimeError("lost")) == "RAISE"


def test_what_a_restart_would_repeat_is_not_tried_again(box: Mailbox) -> None:
    assert decide(restarts(box), RuntimeError("its peer left"), DivergedError("loss/total: nan")) == "RAISE"


def test_a_worker_killed_for_its_memory_comes_back_with_smaller_micro_batches(box: Mailbox) -> None:
    policy = restarts(box, limit=0)
    killed = RuntimeError("Task was killed due to the node running low on memory.")
    for limit in (4, 2, 1):
        box.attempt(2 * limit)
        assert decide(policy, killed) == "RETRY"
        assert box.micro_batch() == limit
    box.attempt(1)
    assert decide(policy, killed) == "RAISE"


def test_a_mailbox_that_is_slow_stops_no_restart(box: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestration import elastic

    def slow(value: Any, timeout: float | None = None) -> Any:
        raise elastic.GetTimeoutError("Get timed out")

    monkeypatch.setattr(elastic.ray, "get", slow)
    policy = restarts(box)
    box.attempt(8)
    assert decide(policy, RuntimeError("killed: the node is running low on memory")) == "RETRY"
    assert box.micro_batch() == 4, "what was asked of it is done all the same"
    assert decide(policy, RuntimeError("lost")) == "RETRY"
    assert decide(policy, RuntimeError("lost")) == "RAISE", "without an answer each failure counts"


def test_a_resize_is_asked_for_and_not_done(box: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
    from ray.train.v2.api.config import ScalingConfig

    from orchestration.elastic import SavedResizes

    policy = SavedResizes(ScalingConfig(num_workers=(1, 4)), Handle(box))
    monkeypatch.setattr(
        ElasticScalingPolicy,
        "make_decision_for_running_worker_group",
        lambda self, **state: ResizeDecision(3, {"CPU": 1}) if state["grown"] else NoopDecision(),
    )
    assert isinstance(policy.make_decision_for_running_worker_group(grown=False), NoopDecision)
    assert box.request() is None
    assert isinstance(policy.make_decision_for_running_worker_group(grown=True), NoopDecision)
    assert box.request() == "resize"


def test_nodes_that_are_dead_or_about_to_go_have_no_room(box: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2.api.config import ScalingConfig

    from orchestration import elastic

    policy = elastic.SavedResizes(ScalingConfig(num_workers=(1, 9), resources_per_worker={"CPU": 2}), Handle(box))
    nodes = [{"NodeID": name, "Alive": name != "dead"} for name in ("good", "dead", "going")]
    monkeypatch.setattr(elastic.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(elastic.ray._private.state.state, "get_draining_nodes", lambda: {"going": 0})
    resources = {name: {"CPU": 4.0} for name in ("good", "dead", "going", "unknown")}
    assert policy._count_possible_workers(resources) == 2


def test_the_ranks_are_told_once_of_a_node_that_goes(box: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestration import elastic

    draining: dict[str, int] = {}
    monkeypatch.setattr(elastic.ray._private.state.state, "get_draining_nodes", lambda: draining)
    notices = elastic.Notices(Handle(box), "cpu")

    def starts_on(*nodes: str) -> None:
        metadata = [SimpleNamespace(node_id=node) for node in nodes]
        notices.before_init_train_context(
            [SimpleNamespace(metadata=entry, execute_async=lambda *call: None) for entry in metadata]
        )

    def poll(*nodes: str) -> None:
        draining.clear()
        draining.update(dict.fromkeys(nodes, 0))
        notices.after_worker_group_poll_status(None)

    starts_on("a" * 20, "b" * 20)
    poll("c" * 20)  # another run's
    assert box.request() is None
    poll("a" * 20)
    assert box.request() == "leave"
    starts_on("b" * 20, "d" * 20)  # other workers start
    poll("a" * 20)
    assert box.request() is None
    poll("a" * 20, "b" * 20)
    box.attempt(1)  # and are ready only now: the notice, which came while they loaded, is theirs
    assert box.request() == "leave"


def trainer(workers: int | tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Ray Train's controller is given."""
    from ray.train.v2.api.config import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from orchestration.elastic import Trainer
    from orchestration.process_group import ProcessGroup

    given: dict[str, Any] = {}

    def controller(self: Any, **parts: Any) -> Any:
        given.update(parts)
        return SimpleNamespace(error=None)

    monkeypatch.setattr(DataParallelTrainer, "_initialize_and_run_controller", controller)
    monkeypatch.setattr("ray.train.v2._internal.util.ray.put", lambda value: value)
    Trainer(
        print,
        mailbox=None,
        final=(),
        backend_config=ProcessGroup("gloo", timeout_s=7),
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path="/tmp/none"),  # nothing is written
    ).fit()
    return given


@pytest.mark.parametrize("workers", [2, (1, 3)])
def test_ray_starts_no_actors_that_training_does_without(
    workers: int | tuple[int, int], box: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = trainer(workers, monkeypatch)
    names = [type(callback).__name__ for callback in given["callbacks"]]
    assert {"AcceleratorSetupCallback", "BackendSetupCallback", "Notices"} <= set(names), "those that are needed stay"
    assert not {"DatasetsCallback", "PlacementGroupCleanerCallback"} & set(names)
    assert type(given["scaling_policy"]).__name__ == ("OneSize" if workers == 2 else "SavedResizes")


def test_what_is_switched_off_is_rays_own_still() -> None:
    """A Ray that renames or moves one of these would start it again without a word."""
    from ray.train.v2._internal import constants
    from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy
    from ray.train.v2._internal.execution.worker_group import state, worker_group
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from orchestration.fit import TIMES

    assert set(TIMES) <= constants.ENV_VARS_TO_PROPAGATE
    assert constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR in TIMES
    assert callable(ScalingPolicy._maybe_send_resource_request)
    defaults = inspect.getsource(DataParallelTrainer._create_default_callbacks)
    assert "DatasetsCallback(" in defaults
    assert "PlacementGroupCleanerCallback(" in defaults
    assert "SynchronizationActor.options(" in inspect.getsource(worker_group.WorkerGroup)
    assert "_shutdown_sync_actor(self.sync_actor)" in inspect.getsource(state.WorkerGroupState.shutdown)


def test_the_controllers_process_needs_no_torch() -> None:
    """A controller is given these by pickle, and imports their modules before it starts workers."""
    code = "import sys, orchestration.elastic, orchestration.process_group; print('torch' in sys.modules)"
    environment = {**os.environ, "RAY_TRAIN_V2_ENABLED": "1"}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "False"
