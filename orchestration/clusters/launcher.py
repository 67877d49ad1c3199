"""A file for `ray up`: by Ray's own validation, then by what Ray passes on unread."""

import copy
import logging
from collections.abc import Iterator

from orchestration.clusters.machines import MACHINES
from orchestration.clusters.nodes import is_spot, machine_name, machine_problems, spot_problems, worker_count_problems
from orchestration.clusters.rules import Config, pinned_ray, secret_problems
from orchestration.clusters.startup import (
    docker_image_problems,
    install_problems,
    network_problems,
    notice_problems,
    ray_start_problems,
    shared_problems,
    tracking_problems,
)


def launcher_problems(config: Config) -> Iterator[str]:
    """What is wrong with a file for `ray up`."""
    provider = config.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    if not isinstance(kind, str) or kind not in MACHINES:
        yield (
            f"provider.type: {kind!r} is none that is checked here; take one of {', '.join(MACHINES)}, or write a "
            "manifest for KubeRay (apiVersion: ray.io/v1)"
        )
        return
    yield from secret_problems(config)
    refused = ray_refuses(config)
    if refused is not None:
        yield refused
        return  # the rest relies on types that Ray has just checked
    prepared = prepare(config)
    yield from worker_count_problems(config, prepared)
    yield from machine_problems(kind, prepared)
    yield from spot_problems(kind, prepared)
    if any(is_spot(kind, node_type["node_config"]) for node_type in prepared["available_node_types"].values()):
        yield from notice_problems(kind, prepared)
    yield from docker_image_problems(prepared)
    yield from network_problems(kind, prepared)
    yield from ray_start_problems(prepared)
    yield from shared_problems(prepared)
    yield from install_problems(kind, prepared)
    yield from tracking_problems(prepared)


def prepare(config: Config) -> Config:
    """The file with Ray's defaults filled in."""
    from ray.autoscaler._private.util import prepare_config

    logger = logging.getLogger("ray.autoscaler._private.util")
    level = logger.level
    logger.setLevel(logging.WARNING)  # it tells of each default
    try:
        prepared: Config = prepare_config(copy.deepcopy(config))
    finally:
        logger.setLevel(level)
    return prepared


def ray_refuses(config: Config) -> str | None:
    """What Ray's own validation says against a file, if anything."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import validate_config

    try:
        validate_config(prepare(config))
    except ValidationError as error:
        place = ".".join(str(part) for part in error.absolute_path) or "the file"
        return f"{place}: Ray refuses it: {error.message}; see Ray's cluster YAML reference for what belongs there"
    except Exception as error:  # Ray raises what it comes across: KeyError, AssertionError, ValueError
        said = " ".join(str(error).split())
        return f"the file: Ray refuses it: {said or type(error).__name__}; see Ray's cluster YAML reference"
    return None


def launcher_facts(config: Config) -> Iterator[str]:
    """What holds in a file without problems."""
    prepared, kind = prepare(config), config["provider"]["type"]
    yield f"Ray {pinned_ray()} accepts it, and so do {kind}'s fields of every node_config"
    for name, node_type in prepared["available_node_types"].items():
        machine = machine_name(kind, node_type["node_config"])
        if name == prepared["head_node_type"]:
            yield f"head: {machine}, no work on it; MLflow's artifacts are in a bucket"
        else:
            price = "spot" if is_spot(kind, node_type["node_config"]) else "on demand"
            has = ", ".join(f"{count} {what}" for what, count in node_type["resources"].items())
            yield f"{name}: {node_type['min_workers']} to {node_type['max_workers']} {machine} ({has}), {price}"
    yield f"idle nodes go after {config['idle_timeout_minutes']} min"
    yield "token on every node, dashboard on loopback, no public address, no secret in the file"
