"""Which machines a file for `ray up` rents: how many, what they have, at which price."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from orchestration.clusters.machines import GCE_INSTANCE, MACHINES, RUN_INSTANCES, Machine
from orchestration.clusters.rules import LONGEST_IDLE, Config, part, parts, unknown
from orchestration.clusters.startup import head_starts


def worker_count_problems(config: Config, prepared: Config) -> Iterator[str]:
    head, most = prepared["head_node_type"], prepared["max_workers"]
    workers = {name: kind for name, kind in prepared["available_node_types"].items() if name != head}
    if "max_workers" not in config or most < 1:
        yield f"max_workers: {config.get('max_workers')} lets no worker come; set the most nodes that you will pay for"
    for name, kind in workers.items():
        path, least, largest = f"available_node_types.{name}", kind["min_workers"], kind["max_workers"]
        if least > largest:
            yield f"{path}.min_workers: {least} is more than its max_workers: {largest}; lower it or raise max_workers"
        if largest < 1:
            yield f"{path}.max_workers: {largest} lets none of it come; raise it or remove the type"
        if largest > most:
            yield f"{path}.max_workers: {largest} is more than max_workers: {most} of all types; lower it or raise that"
    if not workers:
        yield f"available_node_types: {head!r} is the only type, so there are no workers; add a type"
    cpus = prepared["available_node_types"][head]["resources"].get("CPU")
    if cpus != 0:
        said = "not set" if cpus is None else cpus
        yield (
            f"available_node_types.{head}.resources.CPU: {said}, so training may be placed on the head and end it; "
            "set it to 0"
        )
    idle = config.get("idle_timeout_minutes")
    if idle is None or not 0 < idle <= LONGEST_IDLE:
        yield (
            f"idle_timeout_minutes: {idle} is no limit to what idle nodes cost; set minutes, above 0 and at most "
            f"{LONGEST_IDLE}"
        )


def machine_problems(provider: str, prepared: Config) -> Iterator[str]:
    for name, kind in prepared["available_node_types"].items():
        path, node = f"available_node_types.{name}", kind["node_config"]
        yield from _fields(provider, f"{path}.node_config", node)
        machine, known = machine_name(provider, node), MACHINES[provider]
        field = "InstanceType" if provider == "aws" else "machineType"
        if machine not in known:
            yield from _unknown_machine(f"{path}.node_config.{field}", machine, known)
            continue
        yield from _resources(path, kind["resources"], machine, _with_accelerators(known[machine], node))


def spot_problems(provider: str, prepared: Config) -> Iterator[str]:
    head, kinds = prepared["head_node_type"], prepared["available_node_types"]
    spot = {name: kind for name, kind in kinds.items() if is_spot(provider, kind["node_config"])}
    if head in spot:
        yield f"available_node_types.{head}: a spot head takes the whole cluster with it; make it on demand"
    lasting = {name: kind for name, kind in kinds.items() if name not in spot and name != head}
    for name, kind in spot.items():
        if name == head:
            continue
        path = f"available_node_types.{name}"
        alike = {other: each for other, each in lasting.items() if each["resources"] == kind["resources"]}
        if not alike:
            yield (
                f"{path}: a run waits for ever when there is no spot capacity; add a type on demand with its "
                f"resources {kind['resources']} and a lower priority"
            )
        for other, each in alike.items():
            if kind.get("priority", 0) <= each.get("priority", 0):
                yield (
                    f"{path}.priority: {kind.get('priority', 0)} is not above that of {other}, "
                    f"{each.get('priority', 0)}; raise it, or nodes on demand may come first"
                )
        market = part(part(kind["node_config"], "InstanceMarketOptions"), "SpotOptions")
        if market.get("SpotInstanceType") == "persistent":
            yield (
                f"{path}.node_config.InstanceMarketOptions.SpotOptions.SpotInstanceType: persistent brings back nodes "
                "that the autoscaler has ended; take one-time"
            )
    if spot and lasting:
        for start in head_starts(prepared):
            if start.env.get("RAY_enable_autoscaler_v2", "").lower() not in ("1", "true"):
                yield (
                    f"{start.path}: without RAY_enable_autoscaler_v2=1 Ray's scheduler ignores priority and never "
                    "falls back from spot to on demand; set it before ray start --head"
                )


def machine_name(provider: str, node: Config) -> str:
    return str(node.get("InstanceType" if provider == "aws" else "machineType"))


def is_spot(provider: str, node: Config) -> bool:
    if provider == "aws":
        return part(node, "InstanceMarketOptions").get("MarketType") == "spot"
    scheduling = [part(node, "scheduling"), *parts(node, "scheduling")]  # Ray's examples have a list
    return any(each.get("provisioningModel") == "SPOT" or each.get("preemptible") for each in scheduling)


def _fields(provider: str, path: str, node: Config) -> Iterator[str]:
    if provider == "gcp":
        yield from unknown(path, node, GCE_INSTANCE, "GCP's Instance")
        return
    own = {key: value for key, value in node.items() if key != "SubnetIds"}  # Ray's: it takes one of them
    try:
        shape, validator = run_instances()
    except ImportError:
        yield from unknown(path, own, RUN_INSTANCES, "EC2's RunInstances")
        return
    report = validator.validate({**own, "MinCount": 1, "MaxCount": 1}, shape).generate_report()
    for line in report.splitlines():
        yield _ec2_sentence(path, line, sorted(shape.members))


@cache
def run_instances() -> tuple[Any, Any]:
    """botocore's model of what RunInstances takes, and what validates by it. Raises: ImportError."""
    from botocore.session import Session
    from botocore.validate import ParamValidator

    return Session().get_service_model("ec2").operation_model("RunInstances").input_shape, ParamValidator()


def _ec2_sentence(path: str, line: str, members: list[str]) -> str:
    """botocore's finding, with its place in the file."""
    if found := re.match(r'Unknown parameter in (\S+): "(\S+)", must be one of: (.*)', line):
        where = path if found[1] == "input" else f"{path}.{found[1]}"
        known = members if found[1] == "input" else found[3].split(", ")
        return next(unknown(where, [found[2]], known, "EC2's RunInstances"))
    if found := re.match(r"Invalid (type|length|range) for parameter ([^,\s]+)(.*)", line):
        return f"{path}.{found[2]}: EC2 refuses it: invalid {found[1]}{found[3]}; correct the value"
    return f"{path}: EC2 refuses it: {line}; correct the value"


def _unknown_machine(path: str, machine: object, known: dict[str, Machine]) -> Iterator[str]:
    """A machine type that is not in the table."""
    yield from (
        sentence.replace(f"{path}.{machine}: ", f"{path}: {machine!r}: ")
        for sentence in unknown(path, [str(machine)], known, "the table of orchestration/clusters/machines.py")
    )


def _resources(path: str, resources: dict[str, int], name: str, machine: Machine) -> Iterator[str]:
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    if cpus > machine.cpus:
        yield f"{path}.resources.CPU: {cpus} is more than {name} has, {machine.cpus}; declare that or less"
    if gpus > machine.gpus:
        yield f"{path}.resources.GPU: {gpus} is more than {name} has, {machine.gpus}; declare that"
    elif gpus < machine.gpus:
        yield f"{path}.resources.GPU: {gpus} leaves GPUs of {name} unused, it has {machine.gpus}; declare that"


def _with_accelerators(machine: Machine, node: Config) -> Machine:
    """GCP: a machine and the GPUs that are put into it."""
    added = sum(int(each.get("acceleratorCount", 1)) for each in parts(node, "guestAccelerators"))
    return Machine(machine.cpus, machine.gpus + added)
