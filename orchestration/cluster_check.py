"""Whether a cluster file does what it should, before a machine is rented: Ray's own checks, and what Ray does not see.

Ray validates the fields that it reads and passes the rest on: a wrong key in node_config fails in the cloud, a wrong
image when the nodes start, an open port never. Nothing here needs a network or an account.
"""

import copy
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from orchestration.cluster_rules import (
    LONGEST_IDLE,
    LOOPBACK,
    Start,
    all_starts,
    image_problems,
    mlflow_problems,
    part,
    parts,
    pinned_ray,
    placeholders,
    requirement,
    secret_problems,
    texts,
    unknown,
    within,
)
from orchestration.machines import GCE_INSTANCE, MACHINES, RUN_INSTANCES, Machine

Config = dict[str, Any]

CLIENTS = {"aws": ("boto3", "boto3"), "gcp": ("google-api-python-client", "google-api-python-client")}
"""What the autoscaler on the head needs, by provider: a field of head_setup_commands replaces Ray's, which bring it."""


class ClusterFileError(Exception):
    """The file cannot be read as a cluster."""


@dataclass(frozen=True)
class Verdict:
    """What was found in a cluster file.

    Fields:
        problems: a sentence for each, with its place in the file, the value and the cure.
        right: what holds; empty unless there is no problem.
        open: what is left for the user to fill in.
    """

    problems: tuple[str, ...]
    right: tuple[str, ...]
    open: tuple[str, ...]


def check_cluster(path: Path) -> Verdict:
    """Checks a cluster file: of Ray's cluster launcher (AWS, GCP), or a manifest for KubeRay.

    Raises:
        ClusterFileError: there is no such file, or it is not YAML.
    """
    from orchestration.kuberay_check import kuberay_facts, kuberay_problems

    config = _read(path)
    of_kuberay = str(config.get("apiVersion", "")).startswith("ray.io/")
    problems = kuberay_problems(config) if of_kuberay else launcher_problems(config)
    found = tuple(dict.fromkeys(problems))  # one mistake may be met twice
    facts = kuberay_facts(config) if of_kuberay else launcher_facts(config)
    return Verdict(found, () if found else tuple(facts), tuple(placeholders(config)))


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
    yield from _worker_counts(config, prepared)
    yield from _machines(kind, prepared)
    yield from _spot(kind, prepared)
    yield from _images(prepared)
    yield from _network(kind, prepared)
    yield from _ray_starts(prepared)
    yield from _installs(kind, prepared)
    yield from _tracking(prepared)


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
        machine = _machine_name(kind, node_type["node_config"])
        if name == prepared["head_node_type"]:
            yield f"head: {machine}, no work on it; MLflow's artifacts are in a bucket"
        else:
            price = "spot" if _is_spot(kind, node_type["node_config"]) else "on demand"
            has = ", ".join(f"{count} {what}" for what, count in node_type["resources"].items())
            yield f"{name}: {node_type['min_workers']} to {node_type['max_workers']} {machine} ({has}), {price}"
    yield f"idle nodes go after {config['idle_timeout_minutes']} minutes"
    yield "token on every node, dashboard on loopback, no public address, no secret in the file"


# --- what Ray does not see -------------------------------------------------------------------------------------------


def _worker_counts(config: Config, prepared: Config) -> Iterator[str]:
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


def _machines(provider: str, prepared: Config) -> Iterator[str]:
    for name, kind in prepared["available_node_types"].items():
        path, node = f"available_node_types.{name}", kind["node_config"]
        yield from _fields(provider, f"{path}.node_config", node)
        machine, known = _machine_name(provider, node), MACHINES[provider]
        field = "InstanceType" if provider == "aws" else "machineType"
        if machine not in known:
            yield from unknown_machine(f"{path}.node_config.{field}", machine, known)
            continue
        yield from _resources(path, kind["resources"], machine, _with_accelerators(known[machine], node))


def _fields(provider: str, path: str, node: Config) -> Iterator[str]:
    if provider == "gcp":
        yield from unknown(path, node, GCE_INSTANCE, "GCP's Instance")
        return
    own = {key: value for key, value in node.items() if key != "SubnetIds"}  # Ray's: it takes one of them
    try:
        shape, validator = _run_instances()
    except ImportError:
        yield from unknown(path, own, RUN_INSTANCES, "EC2's RunInstances")
        return
    report = validator.validate({**own, "MinCount": 1, "MaxCount": 1}, shape).generate_report()
    for line in report.splitlines():
        yield _ec2_sentence(path, line, sorted(shape.members))


@cache
def _run_instances() -> tuple[Any, Any]:
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


def unknown_machine(path: str, machine: object, known: dict[str, Machine]) -> Iterator[str]:
    """A machine type that is not in the table."""
    yield from (
        sentence.replace(f"{path}.{machine}: ", f"{path}: {machine!r}: ")
        for sentence in unknown(path, [str(machine)], known, "the table of orchestration/machines.py")
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


def _spot(provider: str, prepared: Config) -> Iterator[str]:
    head, kinds = prepared["head_node_type"], prepared["available_node_types"]
    spot = {name: kind for name, kind in kinds.items() if _is_spot(provider, kind["node_config"])}
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
        for start in _heads(prepared):
            if start.env.get("RAY_enable_autoscaler_v2", "").lower() not in ("1", "true"):
                yield (
                    f"{start.path}: without RAY_enable_autoscaler_v2=1 Ray's scheduler ignores priority and never "
                    "falls back from spot to on demand; set it before ray start --head"
                )


def _images(prepared: Config) -> Iterator[str]:
    docker, head = prepared.get("docker") or {}, prepared["head_node_type"]
    if not docker:
        yield f"docker: there is none, so nodes run what their disk image has; name an image with Ray {pinned_ray()}"
        return
    gpus = {name: kind["resources"].get("GPU", 0) > 0 for name, kind in prepared["available_node_types"].items()}
    for role, gpu in (("head", gpus[head]), ("worker", any(gpus[name] for name in gpus if name != head))):
        field = f"{role}_image" if f"{role}_image" in docker else "image"
        yield from image_problems(f"docker.{field}", docker.get(field), gpu)
    for name, kind in prepared["available_node_types"].items():
        if "worker_image" in kind.get("docker", {}):
            path = f"available_node_types.{name}.docker.worker_image"
            yield from image_problems(path, kind["docker"]["worker_image"], gpus[name])


def _network(provider: str, prepared: Config) -> Iterator[str]:
    if prepared["provider"].get("use_internal_ips") is not True:
        yield (
            f"provider.use_internal_ips: {prepared['provider'].get('use_internal_ips')} gives nodes public addresses, "
            "and Ray's ports run the code they are sent; set it to true"
        )
    rules = parts(part(prepared["provider"], "security_group"), "IpPermissions")
    for i, rule in enumerate(rules):
        ranges = [each.get("CidrIp") for each in parts(rule, "IpRanges")]
        ranges += [each.get("CidrIpv6") for each in parts(rule, "Ipv6Ranges")]
        if open_to_all := [each for each in ranges if each in ("0.0.0.0/0", "::/0")]:
            yield (
                f"provider.security_group.IpPermissions[{i}]: {open_to_all[0]} opens port {rule.get('FromPort')} to "
                "the internet; name your own network"
            )
    for name, kind in prepared["available_node_types"].items():
        path, node = f"available_node_types.{name}.node_config", kind["node_config"]
        for i, interface in enumerate(parts(node, "NetworkInterfaces")):
            if interface.get("AssociatePublicIpAddress"):
                yield f"{path}.NetworkInterfaces[{i}].AssociatePublicIpAddress: true is public; set it to false"
        if provider != "gcp":
            continue
        if "networkInterfaces" not in node:
            yield f"{path}.networkInterfaces: not set, so Ray adds one with a public address; name your subnetwork"
        for i, interface in enumerate(parts(node, "networkInterfaces")):
            if interface.get("accessConfigs"):
                yield f"{path}.networkInterfaces[{i}].accessConfigs: this is a public address; leave it out"


def _ray_starts(prepared: Config) -> Iterator[str]:
    heads, workers = _heads(prepared), _workers(prepared)
    if not heads:
        yield "head_start_ray_commands: none runs ray start --head; add one"
    if not workers:
        yield "worker_start_ray_commands: none runs ray start; add one with --address=$RAY_HEAD_IP:6379"
    mounted = [
        option.split()[-1].split(":")[1]
        for option in texts(prepared.get("docker"), "run_options")
        if re.match(r"(-v|--volume)[ =]\S+:\S+", option)
    ]
    homes = {start.env.get("SLOTFORGE_HOME") for start in heads + workers}
    for start in heads + workers:
        if (mode := start.env.get("RAY_AUTH_MODE")) != "token":
            yield f"{start.path}: RAY_AUTH_MODE={mode} lets anybody run code; set RAY_AUTH_MODE=token before ray start"
        home = start.env.get("SLOTFORGE_HOME")
        if home is None or len(homes) > 1:
            yield f"{start.path}: SLOTFORGE_HOME={home}; every ray start needs the same, on storage of all nodes"
        elif not within(home, mounted):
            yield (
                f"{start.path}: SLOTFORGE_HOME={home} is inside the container, and lost with it; mount shared storage "
                f"there with docker.run_options, e.g. -v {home}:{home}"
            )
    for start in workers:
        cache = start.env.get("XDG_CACHE_HOME")
        if cache is None or not within(cache, mounted):
            yield (
                f"{start.path}: XDG_CACHE_HOME={cache}; set it to a folder that docker.run_options mounts from the "
                "node's disk, so that downloaded shards outlive the container"
            )
    for start in heads:
        host = start.option("--dashboard-host")
        if host is not None and host not in LOOPBACK:
            yield f"{start.path}: --dashboard-host={host} shows the dashboard to the network; set it to 127.0.0.1"
        if not (start.option("--autoscaling-config") or "").endswith("ray_bootstrap_config.yaml"):
            yield f"{start.path}: without --autoscaling-config=~/ray_bootstrap_config.yaml no worker ever comes; add it"
        for worker in workers:
            port = start.option("--port") or "6379"
            address = worker.option("--address") or ""
            if address != f"$RAY_HEAD_IP:{port}":
                yield f"{worker.path}: --address={address} is not the head's; write --address=$RAY_HEAD_IP:{port}"
    mounts = prepared.get("file_mounts") or {}
    if not any(str(target).endswith(".ray/auth_token") for target in mounts):
        yield (
            "file_mounts: no node gets the token; add /home/ray/.ray/auth_token: ~/.ray/auth_token, made by "
            "ray get-auth-token --generate"
        )


def _installs(provider: str, prepared: Config) -> Iterator[str]:
    mounts = [str(target).rstrip("/") for target in prepared.get("file_mounts") or {}]
    for section in ("head_setup_commands", "worker_setup_commands"):  # setup_commands are in both by now
        wanted, installed, missing = False, set(), ""
        common = len(prepared["setup_commands"])
        merged = [("setup_commands", prepared["setup_commands"]), (section, prepared[section][common:])]
        for start in (
            start
            for place, commands in merged
            for program in ("pip install", "uv pip install")
            for start in all_starts(place, commands, program)
        ):
            for word in start.arguments:
                if word.startswith("/"):
                    folder = word.partition("[")[0].rstrip("/")
                    wanted = wanted or folder in mounts
                    missing = missing or ("" if folder in mounts else f"{word} is in no file_mounts; ")
                elif not word.startswith("-") and (asked := requirement(word)) is not None:
                    installed.add(asked.name.lower())
                    wanted = wanted or asked.name.lower() == "slotforge"
                    if asked.name == "ray" and not asked.specifier.contains(pinned_ray()):
                        yield f"{start.path}: {word} replaces the image's Ray; the project pins {pinned_ray()}"
        if not wanted:
            yield (
                f"{section}: {missing}nothing installs this project; mount it with file_mounts and pip install "
                "that folder"
            )
        client, package = CLIENTS[provider]
        if section == "head_setup_commands" and client not in installed:
            yield f"{section}: the autoscaler on the head needs {package}, and nothing installs it; add it"


def _tracking(prepared: Config) -> Iterator[str]:
    servers = all_starts("head_start_ray_commands", prepared["head_start_ray_commands"], "mlflow server")
    if not servers:
        yield (
            "head_start_ray_commands: no MLflow server is started, so curves stay in a file that only one driver sees; "
            "start mlflow server"
        )
    for server in servers:
        yield from mlflow_problems(server)


# --- readings --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Config:
    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ClusterFileError(f"{path}: it cannot be read ({error.strerror}); name a file that is there") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ClusterFileError(f"{path}: this is not one YAML document ({said}); correct the file") from error
    if not isinstance(config, dict):
        raise ClusterFileError(
            f"{path}: the file is a {type(config).__name__}; write fields such as 'provider:' at top"
        )
    return config


def _machine_name(provider: str, node: Config) -> str:
    return str(node.get("InstanceType" if provider == "aws" else "machineType"))


def _is_spot(provider: str, node: Config) -> bool:
    if provider == "aws":
        return part(node, "InstanceMarketOptions").get("MarketType") == "spot"
    scheduling = [part(node, "scheduling"), *parts(node, "scheduling")]  # Ray's examples have a list
    return any(each.get("provisioningModel") == "SPOT" or each.get("preemptible") for each in scheduling)


def _heads(prepared: Config) -> list[Start]:
    started = all_starts("head_start_ray_commands", prepared["head_start_ray_commands"], "ray start")
    return [start for start in started if "--head" in start.arguments]


def _workers(prepared: Config) -> list[Start]:
    return all_starts("worker_start_ray_commands", prepared["worker_start_ray_commands"], "ray start")
