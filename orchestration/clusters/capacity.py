"""What a cluster has for ranks, now or when it has grown: one that scales itself may have no worker yet."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestration.clusters.rules import Config
from orchestration.recipe import Recipe, RecipeError


@dataclass(frozen=True)
class Capacity:
    """Of all nodes together, and of the largest one.

    Fields:
        cpus, gpus: as Ray counts them.
        largest: CPUs of the node that has most of them.
    """

    cpus: float
    gpus: float
    largest: float


def cluster_capacity() -> Capacity:
    """Of the cluster that is connected."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    address = ray.get_runtime_context().gcs_address
    return capacity(nodes, autoscaler_config(address, _command_lines()))


def cpus_per_worker(recipe: Recipe) -> int:
    """An equal part of the cluster's cores for each worker: at least one, at most what a node has."""
    has = cluster_capacity()
    return max(1, int(min(has.cpus // recipe.parallel.workers.max, has.largest)))


def use_gpu(recipe: Recipe) -> bool:
    """The recipe's device; auto is a GPU where the cluster has any, or gets any as it grows.

    Raises:
        RecipeError: auto, and the cluster has no workers and does not tell what it will have.
    """
    if recipe.parallel.device != "auto":
        return recipe.parallel.device == "gpu"
    has = cluster_capacity()
    if has.cpus == has.gpus == 0:
        raise RecipeError(
            "parallel.device: auto cannot know what workers will have on a cluster without any yet; say gpu or cpu"
        )
    return has.gpus > 0


def capacity(nodes: Sequence[Mapping[str, float]], config: Config | None) -> Capacity:
    """What nodes have, or those that an autoscaler's configuration lets come, whichever is more.

    Args:
        nodes: the resources of each.
        config: as `ray up` takes it.
    """
    now = _together(nodes)
    if config is None:
        return now
    head, most = config.get("head_node_type"), int(config.get("max_workers", 0))
    workers = [
        kind.get("resources", {})
        for name, kind in config.get("available_node_types", {}).items()
        for _ in range(min(most, int(kind.get("max_workers", most))))
        if name != head
    ]
    grown = [
        _together(sorted(workers, key=lambda has: -float(has.get(resource, 0)))[:most]) for resource in ("CPU", "GPU")
    ]
    return Capacity(
        cpus=max(now.cpus, grown[0].cpus), gpus=max(now.gpus, grown[1].gpus), largest=max(now.largest, grown[0].largest)
    )


def autoscaler_config(gcs_address: str, commands: Iterable[Sequence[str]]) -> Config | None:
    """The configuration of a cluster's autoscaler, where it runs on this machine: drivers of jobs run beside it.

    Args:
        gcs_address: of the cluster.
        commands: of the processes here. Ray tells nobody of its configuration but its monitor.
    """
    for words in commands:
        options = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
        ours = options.get("--gcs-address") == gcs_address and any(word.endswith("monitor.py") for word in words)
        path = Path(options.get("--autoscaling-config", "")).expanduser()
        if ours and path.is_file():
            found = yaml.safe_load(path.read_text())
            return found if isinstance(found, dict) else None
    return None


def _command_lines() -> list[list[str]]:
    return [list(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]


def _together(nodes: Sequence[Mapping[str, Any]]) -> Capacity:
    cpus = [float(has.get("CPU", 0)) for has in nodes]
    return Capacity(sum(cpus), sum(float(has.get("GPU", 0)) for has in nodes), max(cpus, default=0.0))
