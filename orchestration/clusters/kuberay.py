"""The same facts of a manifest for KubeRay: a RayJob, or a RayCluster."""

import copy
import re
from collections.abc import Iterator

import yaml

from orchestration.clusters.machines import KUBERAY
from orchestration.clusters.rules import (
    LONGEST_IDLE,
    LOOPBACK,
    Config,
    Start,
    image_problems,
    mlflow_problems,
    part,
    parts,
    pinned_ray,
    secret_problems,
    starts,
    stop_problems,
    texts,
    unknown,
    within,
)
from orchestration.mailbox import STOP_SECONDS

DRAIN_SECONDS = 30
"""Ray's, where RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S is not set."""
GRACE_SECONDS = 30
"""Kubernetes', from a pod's SIGTERM to its SIGKILL."""
_SPOT_LABELS = ("karpenter.sh/capacity-type", "eks.amazonaws.com/capacityType", "cloud.google.com/gke-spot")


def kuberay_problems(manifest: Config) -> Iterator[str]:
    """What is wrong with a manifest."""
    kind = manifest.get("kind")
    if manifest.get("apiVersion") != "ray.io/v1" or kind not in ("RayJob", "RayCluster"):
        yield f"kind: {manifest.get('apiVersion')} {kind} is not checked here; write ray.io/v1 and RayJob or RayCluster"
        return
    yield from secret_problems(manifest)
    where, spec = _cluster_spec(manifest)
    yield from _shape(manifest, where, spec)
    refused = ray_refuses(where, spec)
    if refused is not None:
        yield refused
        return
    if kind == "RayJob":
        yield from _job(manifest)
    yield from _groups(where, spec)
    yield from _pods(where, spec)
    yield from _network(where, spec)
    yield from _tracking(where, spec)


def ray_refuses(where: str, spec: Config) -> str | None:
    """What Ray's autoscaler says against the cluster: it reads the manifest as its own configuration."""
    try:
        _autoscaling(spec)
    except Exception as error:  # Ray raises what it comes across: KeyError, TypeError, ValidationError
        said = " ".join(str(error).split())
        kind = f"{type(error).__name__} " if isinstance(error, KeyError | TypeError) else ""
        return f"{where}: Ray's autoscaler refuses it: {kind}{said}; see KubeRay's reference of RayCluster"
    return None


def kuberay_facts(manifest: Config) -> Iterator[str]:
    """What holds in a manifest without problems."""
    _, spec = _cluster_spec(manifest)
    config = _autoscaling(spec)
    yield f"Ray {pinned_ray()}'s autoscaler accepts it; every field is one of KubeRay 1.6"
    yield "head: no work on it; MLflow's artifacts are in a bucket"
    for name, group in config["available_node_types"].items():
        if name != config["head_node_type"]:
            has = ", ".join(f"{count} {what}" for what, count in group["resources"].items() if what != "memory")
            yield f"{name}: {group['min_workers']} to {group['max_workers']} pods ({has})"
    yield f"idle pods go after {config['idle_timeout_minutes']:g} min"
    yield "token on every pod, dashboard inside the cluster alone, no secret in the file"


# --- rules -----------------------------------------------------------------------------------------------------------


def _shape(manifest: Config, where: str, spec: Config) -> Iterator[str]:
    yield from unknown("spec", part(manifest, "spec"), KUBERAY[manifest["kind"]], f"KubeRay's {manifest['kind']}")
    if where != "spec":
        yield from unknown(where, spec, KUBERAY["RayCluster"], "KubeRay's RayCluster")
    for name in ("headGroupSpec", "autoscalerOptions", "authOptions"):
        yield from unknown(f"{where}.{name}", part(spec, name), KUBERAY[name], f"KubeRay's {name}")
    for path, group in _all_groups(where, spec):
        if "workerGroupSpecs" in path:
            yield from unknown(path, group, KUBERAY["workerGroupSpecs"], "KubeRay's workerGroupSpecs")
        for name, value in part(group, "rayStartParams").items():
            if not isinstance(value, str):
                yield f"{path}.rayStartParams.{name}: {value!r} is no text, and Kubernetes refuses it; quote it"


def _job(manifest: Config) -> Iterator[str]:
    spec = part(manifest, "spec")
    entrypoint = str(spec.get("entrypoint", ""))
    if not re.search(r"orchestration\.train|\bslotforge train\b", entrypoint):
        yield f"spec.entrypoint: {entrypoint!r} does not train; write python -m orchestration.train --recipe NAME"
    if spec.get("shutdownAfterJobFinishes") is not True and "deletionStrategy" not in spec:
        yield (
            f"spec.shutdownAfterJobFinishes: {spec.get('shutdownAfterJobFinishes')} keeps the cluster, and its costs, "
            "after the job; set it to true"
        )
    try:
        environment = yaml.safe_load(str(spec.get("runtimeEnvYAML") or "{}"))
    except yaml.YAMLError:
        environment = None
    if not isinstance(environment, dict):
        yield "spec.runtimeEnvYAML: the text is no YAML mapping; write fields such as env_vars:"
    else:
        yield from secret_problems(environment, "spec.runtimeEnvYAML")
        yield from stop_problems("spec.runtimeEnvYAML", part(environment, "env_vars"))


def _groups(where: str, spec: Config) -> Iterator[str]:
    if spec.get("rayVersion") != pinned_ray():
        yield f"{where}.rayVersion: {spec.get('rayVersion')!r} is not the pinned Ray; set {pinned_ray()}"
    if spec.get("enableInTreeAutoscaling") is not True:
        yield f"{where}.enableInTreeAutoscaling: {spec.get('enableInTreeAutoscaling')}: pods never go; set it to true"
    idle = part(spec, "autoscalerOptions").get("idleTimeoutSeconds")
    if not isinstance(idle, int) or not 0 < idle <= LONGEST_IDLE * 60:
        yield (
            f"{where}.autoscalerOptions.idleTimeoutSeconds: {idle} is no limit to what idle pods cost; set seconds, "
            f"above 0 and at most {LONGEST_IDLE * 60}"
        )
    config = _autoscaling(spec)
    if config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] != 0:
        yield (
            f'{where}.headGroupSpec.rayStartParams.num-cpus: not "0", so training may be placed on the head and '
            "end it; set it"
        )
    for path, group in _all_groups(where, spec)[1:]:
        least, most = group["minReplicas"], group["maxReplicas"]
        if least > most:
            yield f"{path}.minReplicas: {least} is more than maxReplicas: {most}; lower it or raise that"
        if most < 1:
            yield f"{path}.maxReplicas: {most} lets no pod come; raise it or remove the group"
        if not least <= group.get("replicas", least) <= most:
            yield f"{path}.replicas: {group['replicas']} is not from minReplicas to maxReplicas; leave it out"
        yield from _spot(path, group)
        yield from _drain(path, group)
    if not spec.get("workerGroupSpecs"):
        yield f"{where}.workerGroupSpecs: there are none, so there are no workers; add a group"


def _drain(path: str, group: Config) -> Iterator[str]:
    """`ray start` drains its node at the SIGTERM that a pod gets, if Kubernetes gives it the time."""
    pod = part(part(group, "template"), "spec")
    drain = _environment(_ray_container(group)).get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", str(DRAIN_SECONDS))
    grace = pod.get("terminationGracePeriodSeconds", GRACE_SECONDS)
    if not drain.isdigit() or int(drain) < int(STOP_SECONDS):
        yield (
            f"{path}.template.spec.containers[0].env: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S={drain} is too little for "
            f"ranks to save before their pod goes; set {STOP_SECONDS:.0f} or more"
        )
    elif not isinstance(grace, int) or grace <= int(drain):
        yield (
            f"{path}.template.spec.terminationGracePeriodSeconds: {grace} is not above "
            f"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S={drain}, so pods are killed while ranks save; raise it"
        )


def _spot(path: str, group: Config) -> Iterator[str]:
    """Kubernetes falls back by itself where spot is preferred; where it is required, pods wait."""
    pod = part(part(group, "template"), "spec")
    required = part(part(pod, "affinity"), "nodeAffinity").get("requiredDuringSchedulingIgnoredDuringExecution")
    for field, text in (("nodeSelector", str(pod.get("nodeSelector"))), ("affinity", str(required))):
        if any(label in text for label in _SPOT_LABELS):
            yield (
                f"{path}.template.spec.{field}: pods wait for ever when there is no spot capacity; prefer it instead: "
                "affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution"
            )


def _pods(where: str, spec: Config) -> Iterator[str]:
    if part(spec, "authOptions").get("mode") != "token":
        mode = part(spec, "authOptions").get("mode")
        yield f"{where}.authOptions.mode: {mode} lets anybody in the cluster run code; set it to token"
    groups = _all_groups(where, spec)
    homes = {_environment(_ray_container(group)).get("SLOTFORGE_HOME") for _, group in groups}
    for path, group in groups:
        pod, container = part(part(group, "template"), "spec"), _ray_container(group)
        place = f"{path}.template.spec.containers[0]"
        limits, requests = (part(part(container, "resources"), name) for name in ("limits", "requests"))
        gpus = int(limits.get("nvidia.com/gpu", 0))
        yield from image_problems(f"{place}.image", container.get("image"), gpus > 0)
        if re.search(r"(^|/)rayproject/", str(container.get("image"))):
            yield (
                f"{place}.image: {container['image']} does not have this project in it; build your own from it, with "
                f"ray{pinned_ray()} in its tag"
            )
        for name in ("cpu", "memory"):
            if name not in limits and name not in requests:
                yield f"{place}.resources.limits.{name}: not set, so the pod may take, or get, any; set it"
        if requests.get("nvidia.com/gpu", gpus) != limits.get("nvidia.com/gpu", gpus):
            yield f"{place}.resources.requests: its nvidia.com/gpu is not that of limits; Kubernetes wants them equal"
        home = _environment(container).get("SLOTFORGE_HOME")
        if home is None or len(homes) > 1:
            yield f"{place}.env: SLOTFORGE_HOME={home}; every pod needs the same, on storage that all pods share"
        elif not within(home, _shared_folders(pod, container)):
            yield (
                f"{place}.env: SLOTFORGE_HOME={home} is inside the pod, and lost with it; mount a "
                "persistentVolumeClaim of access mode ReadWriteMany there"
            )


def _network(where: str, spec: Config) -> Iterator[str]:
    head = part(spec, "headGroupSpec")
    if head.get("enableIngress"):
        yield f"{where}.headGroupSpec.enableIngress: true shows the dashboard outside; set it to false"
    for path, service in (
        (f"{where}.headGroupSpec.serviceType", head.get("serviceType")),
        (f"{where}.headGroupSpec.headService.spec.type", part(part(head, "headService"), "spec").get("type")),
    ):
        if service not in (None, "ClusterIP"):
            yield f"{path}: {service} shows the dashboard outside the cluster; take ClusterIP"
    for path, group in _all_groups(where, spec):
        if part(part(group, "template"), "spec").get("hostNetwork"):
            yield f"{path}.template.spec.hostNetwork: true opens Ray's ports on the node's addresses; leave it out"


def _tracking(where: str, spec: Config) -> Iterator[str]:
    pod = part(part(part(spec, "headGroupSpec"), "template"), "spec")
    servers: list[tuple[Start, list[str]]] = []
    for i, container in enumerate(parts(pod, "containers")):
        path = f"{where}.headGroupSpec.template.spec.containers[{i}]"
        words = [str(word) for field in ("command", "args") for word in texts(container, field)]
        shared = _shared_folders(pod, container)
        if words[:2] == ["mlflow", "server"]:
            servers.append((Start(path, _environment(container), words[2:]), shared))
        else:
            servers += [(start, shared) for word in words for start in starts(path, word, ["mlflow", "server"])]
    if not servers:
        yield (
            f"{where}.headGroupSpec.template.spec.containers: none runs mlflow server, so curves stay in a file that "
            f"only one driver sees; add a container with it, on {LOOPBACK[0]}"
        )
    for server, shared in servers:
        yield from mlflow_problems(server, shared)


# --- readings --------------------------------------------------------------------------------------------------------


def _cluster_spec(manifest: Config) -> tuple[str, Config]:
    """Where the cluster stands in a manifest, and its specification."""
    spec = part(manifest, "spec")
    return ("spec", spec) if manifest["kind"] == "RayCluster" else ("spec.rayClusterSpec", part(spec, "rayClusterSpec"))


def _autoscaling(spec: Config) -> Config:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    resource = {"metadata": {"name": "checked", "namespace": "default"}, "spec": copy.deepcopy(spec)}
    config: Config = _derive_autoscaling_config_from_ray_cr(resource)  # it ends with Ray's validate_config
    return config


def _all_groups(where: str, spec: Config) -> list[tuple[str, Config]]:
    """The head's group, then the workers'."""
    workers = parts(spec, "workerGroupSpecs")
    return [(f"{where}.headGroupSpec", part(spec, "headGroupSpec"))] + [
        (f"{where}.workerGroupSpecs[{i}]", group) for i, group in enumerate(workers)
    ]


def _shared_folders(pod: Config, container: Config) -> list[str]:
    """Where a container has mounted what outlives its pod."""
    claimed = {str(each.get("name")) for each in parts(pod, "volumes") if "persistentVolumeClaim" in each}
    mounts = parts(container, "volumeMounts")
    return [str(each.get("mountPath")) for each in mounts if str(each.get("name")) in claimed]


def _ray_container(group: Config) -> Config:
    """Ray's is the first container of a pod."""
    return (parts(part(part(group, "template"), "spec"), "containers") or [{}])[0]


def _environment(container: Config) -> dict[str, str]:
    return {str(each.get("name")): str(each.get("value")) for each in parts(container, "env") if "value" in each}
