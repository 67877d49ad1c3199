"""Cluster files are checked by Ray's own code and by ours; every kind of mistake is found, and named with its place."""

import copy
import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestration.cli import app
from orchestration.clusters import kuberay, launcher, nodes
from orchestration.clusters.check import ClusterFileError, check_cluster
from orchestration.clusters.kuberay import kuberay_problems
from orchestration.clusters.launcher import launcher_problems, prepare
from orchestration.clusters.machines import AWS, RUN_INSTANCES
from orchestration.clusters.rules import in_background, pinned_ray, secret_problems, starts

ROOT = Path(__file__).parents[3]
FILES = {"aws": ROOT / "cluster.yaml", "gcp": ROOT / "clusters/gcp.yaml", "k8s": ROOT / "clusters/kuberay-rayjob.yaml"}
NOTHING = object()  # the field is taken away


def load(name: str) -> Any:
    return yaml.safe_load(FILES[name].read_text())


def change(config: Any, place: str, value: Any) -> None:
    """Sets, or takes away, what stands at a place such as a.b[0].c; a value may be a function of the old one."""
    *way, last = [int(part) if part.isdigit() else part for part in re.split(r"\.|\[|\]\.?", place) if part]
    for part in way:
        config = config[part]
    if value is NOTHING:
        del config[last]
    else:
        config[last] = value(config[last]) if callable(value) else value


def problems_of(config: Any, tmp_path: Path) -> list[str]:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return list(check_cluster(path).problems)


def replaced(old: str, new: str) -> Callable[[str], str]:
    def replace(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return replace


@pytest.mark.parametrize("name", FILES)
def test_the_projects_files_are_right(name: str) -> None:
    verdict = check_cluster(FILES[name])
    assert verdict.problems == ()
    assert any("idle" in fact for fact in verdict.right) and any("token" in fact for fact in verdict.right)
    assert any("YOUR-BUCKET" in place for place in verdict.open)


def test_the_version_is_the_one_that_the_project_pins() -> None:
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert pinned_ray() == next(pin.partition("==")[2] for pin in pins if pin.startswith("ray["))


GPU, HEAD = "available_node_types.gpu-spot", "available_node_types.head"
RAYCLUSTER = "spec.rayClusterSpec"
WORKERS, HEADS = f"{RAYCLUSTER}.workerGroupSpecs[0]", f"{RAYCLUSTER}.headGroupSpec"
MISTAKES: list[tuple[str, str, Any, str, str]] = [
    # file, place of the change, new value, how the sentence about it begins, and what it says
    ("aws", "provider.type", "azure", "provider.type", "azure"),
    ("aws", "provider", NOTHING, "provider.type", "None"),
    ("aws", "idle_timeout", 3, "the file", "idle_timeout"),
    ("aws", "max_workers", "many", "max_workers", "not of type 'integer'"),
    ("aws", "head_node_type", "boss", "the file", "head"),
    ("aws", f"{GPU}.min_workers", 20, "the file", "max_workers"),
    ("aws", f"{GPU}.max_workers", 9, f"{GPU}.max_workers", "9 is more than max_workers: 8"),
    ("aws", f"{GPU}.max_workers", 0, f"{GPU}.max_workers", "none of it"),
    ("aws", f"{GPU}", lambda kind: {**kind, "min_workers": 3, "max_workers": 2}, f"{GPU}.min_workers", "3 is more"),
    ("aws", "max_workers", 0, "max_workers", "no worker"),
    ("aws", "idle_timeout_minutes", NOTHING, "idle_timeout_minutes", "None"),
    ("aws", "idle_timeout_minutes", 0, "idle_timeout_minutes", "above 0"),
    ("aws", "idle_timeout_minutes", 600, "idle_timeout_minutes", "600"),
    ("aws", f"{HEAD}.resources", {}, f"{HEAD}.resources.CPU", "not set"),
    ("aws", f"{HEAD}.resources.CPU", 4, f"{HEAD}.resources.CPU", "set it to 0"),
    ("aws", f"{GPU}.node_config.InstanceTyp", "g5.xlarge", f"{GPU}.node_config.InstanceTyp", "'InstanceType'"),
    ("aws", f"{GPU}.node_config.SpotPrice", 1, f"{GPU}.node_config.SpotPrice", "no such field"),
    (
        "aws",
        f"{GPU}.node_config.BlockDeviceMappings[0].Ebs",
        {"VolumeSizes": 5},
        f"{GPU}.node_config.BlockDeviceMappings[0].Ebs.VolumeSizes",
        "VolumeSize",
    ),
    (
        "aws",
        f"{GPU}.node_config.BlockDeviceMappings[0].Ebs.VolumeSize",
        "big",
        f"{GPU}.node_config.BlockDeviceMappings[0].Ebs.VolumeSize",
        "type",
    ),
    ("aws", f"{GPU}.node_config.InstanceMarketOptions", "spot", f"{GPU}.node_config.InstanceMarketOptions", "type"),
    ("aws", f"{GPU}.node_config.InstanceType", "g5.2xlage", f"{GPU}.node_config.InstanceType", "'g5.2xlarge'"),
    ("aws", f"{GPU}.node_config.InstanceType", "g5.xlarge", f"{GPU}.resources.CPU", "8 is more than g5.xlarge has, 4"),
    ("aws", f"{GPU}.node_config.InstanceType", "m6i.2xlarge", f"{GPU}.resources.GPU", "1 is more"),
    ("aws", f"{GPU}.node_config.InstanceType", "g5.12xlarge", f"{GPU}.resources.GPU", "has 4"),
    ("aws", "available_node_types.gpu-on-demand", NOTHING, GPU, "no spot capacity"),
    ("aws", f"{GPU}.priority", NOTHING, f"{GPU}.priority", "gpu-on-demand"),
    (
        "aws",
        f"{GPU}.node_config.InstanceMarketOptions.SpotOptions",
        {"SpotInstanceType": "persistent"},
        f"{GPU}.node_config.InstanceMarketOptions.SpotOptions.SpotInstanceType",
        "one-time",
    ),
    ("aws", f"{HEAD}.node_config.InstanceMarketOptions", {"MarketType": "spot"}, HEAD, "spot head"),
    (
        "aws",
        "head_start_ray_commands[3]",
        replaced("RAY_enable_autoscaler_v2=1", ""),
        "head_start_ray_commands[3]",
        "RAY_enable_autoscaler_v2=1",
    ),
    (
        "aws",
        "head_start_ray_commands[2]",
        lambda command: command.rstrip().removesuffix("&"),
        "head_start_ray_commands[2]",
        "ray up waits",
    ),
    (
        "aws",
        "worker_start_ray_commands[3]",
        lambda command: command.rstrip().removesuffix("&"),
        "worker_start_ray_commands[3]",
        "ray up waits",
    ),
    ("aws", "initialization_commands", [], "initialization_commands", "nothing is mounted at /shared"),
    ("gcp", "initialization_commands[1]", "true", "initialization_commands", "nothing is mounted at /shared"),
    ("aws", "docker.worker_image", replaced("2.60.0", "2.59.0"), "docker.worker_image", "pins"),
    ("aws", "docker.worker_image", "rayproject/ray:latest", "docker.worker_image", "no version"),
    ("aws", "docker.worker_image", "rayproject/ray", "docker.worker_image", "no tag"),
    ("aws", "docker.worker_image", "rayproject/ray:2.60.0-gpu", "docker.worker_image", "which Python"),
    ("aws", "docker.worker_image", replaced("py311", "py310"), "docker.worker_image", "Python 3.10"),
    ("aws", "docker.worker_image", replaced("gpu", "cpu"), "docker.worker_image", "CUDA"),
    ("aws", "docker.head_image", replaced("2.60.0", "2.6.0"), "docker.head_image", "2.6.0"),
    ("aws", "docker", {}, "docker", "name an image"),
    ("aws", "provider.use_internal_ips", False, "provider.use_internal_ips", "public"),
    ("aws", f"{GPU}.node_config.SubnetIds", NOTHING, f"{GPU}.node_config.SubnetIds", "public"),
    ("aws", f"{HEAD}.node_config.SubnetIds", [], f"{HEAD}.node_config.SubnetIds", "name private ones"),
    (
        "aws",
        "provider.security_group",
        {"IpPermissions": [{"FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]},
        "provider.security_group.IpPermissions[0]",
        "8265",
    ),
    (
        "aws",
        f"{GPU}.node_config.NetworkInterfaces",
        [{"DeviceIndex": 0, "AssociatePublicIpAddress": True}],
        f"{GPU}.node_config.NetworkInterfaces[0].AssociatePublicIpAddress",
        "public",
    ),
    (
        "aws",
        "head_start_ray_commands[3]",
        replaced("127.0.0.1", "0.0.0.0"),
        "head_start_ray_commands[3]",
        "--dashboard-host=0.0.0.0",
    ),
    ("aws", "head_start_ray_commands", NOTHING, "head_start_ray_commands[1]", "--dashboard-host=0.0.0.0"),
    (
        "aws",
        "head_start_ray_commands[3]",
        replaced("--autoscaling-config=~/ray_bootstrap_config.yaml", ""),
        "head_start_ray_commands[3]",
        "--autoscaling-config",
    ),
    (
        "aws",
        "head_start_ray_commands[3]",
        replaced("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
        "head_start_ray_commands[3]",
        "RAY_AUTH_MODE=disabled",
    ),
    (
        "aws",
        "worker_start_ray_commands[2]",
        replaced("RAY_AUTH_MODE=token", ""),
        "worker_start_ray_commands[2]",
        "RAY_AUTH_MODE=None",
    ),
    (
        "aws",
        "worker_start_ray_commands[2]",
        replaced("RAY_HEAD_IP:6379", "RAY_HEAD_IP:6380"),
        "worker_start_ray_commands[2]",
        "6379",
    ),
    (
        "aws",
        "worker_start_ray_commands[2]",
        replaced("/shared/slotforge", "/shared/other"),
        "worker_start_ray_commands[2]",
        "SLOTFORGE_HOME=/shared/other",
    ),
    ("aws", "worker_start_ray_commands", ["ray stop"], "worker_start_ray_commands", "none runs ray start"),
    (
        "aws",
        "worker_start_ray_commands[2]",
        replaced("=/cache", "=/tmp/cache"),
        "worker_start_ray_commands[2]",
        "XDG_CACHE_HOME=/tmp/cache",
    ),
    ("aws", "docker.run_options[2]", NOTHING, "head_start_ray_commands[3]", "inside the container"),
    (
        "aws",
        "head_start_ray_commands[3]",
        replaced("RAY_JOB_STOP_WAIT_TIME_S=90", ""),
        "head_start_ray_commands[3]",
        "RAY_JOB_STOP_WAIT_TIME_S=None",
    ),
    (
        "aws",
        "head_start_ray_commands[3]",
        replaced("STOP_WAIT_TIME_S=90", "STOP_WAIT_TIME_S=60"),
        "head_start_ray_commands[3]",
        "set 90 or more",
    ),
    (
        "aws",
        "head_start_ray_commands[3]",
        replaced("SLOTFORGE_RUNS=s3://YOUR-BUCKET/runs", "SLOTFORGE_RUNS=/home/ray/runs"),
        "head_start_ray_commands[3]",
        "SLOTFORGE_RUNS=/home/ray/runs",
    ),
    ("aws", "worker_start_ray_commands[3]", NOTHING, "worker_start_ray_commands", "spot notices"),
    (
        "aws",
        "worker_start_ray_commands[3]",
        replaced("spot aws", "spot gcp"),
        "worker_start_ray_commands[3]",
        "another cloud; write aws",
    ),
    (
        "gcp",
        "worker_start_ray_commands[3]",
        replaced("RAY_AUTH_MODE=token", ""),
        "worker_start_ray_commands[3]",
        "does not listen",
    ),
    (
        "k8s",
        "spec.runtimeEnvYAML",
        replaced('"90"', '"60"'),
        "spec.runtimeEnvYAML",
        "RAY_JOB_STOP_WAIT_TIME_S=60",
    ),
    (
        "k8s",
        f"{WORKERS}.template.spec.terminationGracePeriodSeconds",
        NOTHING,
        f"{WORKERS}.template.spec.terminationGracePeriodSeconds",
        "30 is not above",
    ),
    (
        "k8s",
        f"{WORKERS}.template.spec.containers[0].env[2]",
        NOTHING,
        f"{WORKERS}.template.spec.containers[0].env",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=30",
    ),
    ("aws", "file_mounts./home/ray/slotforge", NOTHING, "worker_setup_commands", "in no file_mounts"),
    ("aws", "worker_setup_commands", ["pip install -q boto3"], "worker_setup_commands", "nothing installs"),
    ("aws", "worker_setup_commands[0]", "pip install ray==2.59.0 slotforge", "worker_setup_commands[0]", "2.60.0"),
    ("aws", "setup_commands", ["pip install ray==2.59.0"], "setup_commands[0]", "ray==2.59.0"),
    ("aws", "head_setup_commands[1]", replaced("boto3", ""), "head_setup_commands", "boto3"),
    ("aws", "head_start_ray_commands[2]", NOTHING, "head_start_ray_commands", "mlflow server"),
    (
        "aws",
        "head_start_ray_commands[2]",
        replaced("sqlite:////shared/mlflow/mlflow.db", "sqlite:////home/ray/mlflow.db"),
        "head_start_ray_commands[2]",
        "curves in 'sqlite:////home/ray/mlflow.db', lost",
    ),
    (
        "aws",
        "head_start_ray_commands[2]",
        replaced("--backend-store-uri sqlite:////shared/mlflow/mlflow.db", ""),
        "head_start_ray_commands[2]",
        "add --backend-store-uri",
    ),
    (
        "aws",
        "head_start_ray_commands[2]",
        replaced("s3://YOUR-BUCKET/mlflow", "/shared/mlflow/artifacts"),
        "head_start_ray_commands[2]",
        "/shared/mlflow/artifacts",
    ),
    (
        "aws",
        "head_start_ray_commands[2]",
        replaced('--host "$IP"', "--host 0.0.0.0"),
        "head_start_ray_commands[2]",
        "pub",
    ),
    (
        "aws",
        "head_start_ray_commands[2]",
        replaced("--app-name basic-auth", ""),
        "head_start_ray_commands[2]",
        "asks nobody",
    ),
    (
        "aws",
        "head_start_ray_commands[2]",
        replaced('"$IP:5000,localhost:5000"', "'*'"),
        "head_start_ray_commands[2]",
        "--allowed-hosts *",
    ),
    (
        "aws",
        "head_start_ray_commands[2]",
        replaced('SECRET="$(cat ~/.ray/auth_token)"', "SECRET=hunter2"),
        "head_start_ray_commands[2]",
        "secret",
    ),
    (
        "aws",
        "provider.aws_credentials",
        {"aws_access_key_id": "AKIA" + 16 * "A"},
        "provider.aws_credentials.",
        "secret",
    ),
    ("gcp", "provider.use_internal_ips", NOTHING, "provider.use_internal_ips", "None"),
    ("gcp", f"{GPU}.node_config.machineTyp", "x", f"{GPU}.node_config.machineTyp", "'machineType'"),
    ("gcp", f"{GPU}.node_config.machineType", "g2-standard-24", f"{GPU}.resources.GPU", "has 2"),
    ("gcp", f"{GPU}.node_config.machineType", "n1-standard-8", f"{GPU}.resources.GPU", "1 is more"),
    ("gcp", f"{GPU}.node_config.networkInterfaces", NOTHING, f"{GPU}.node_config.networkInterfaces", "public"),
    (
        "gcp",
        f"{GPU}.node_config.networkInterfaces",
        [{"accessConfigs": [{"type": "ONE_TO_ONE_NAT"}]}],
        f"{GPU}.node_config.networkInterfaces[0].accessConfigs",
        "public",
    ),
    ("gcp", "available_node_types.gpu-on-demand", NOTHING, GPU, "no spot capacity"),
    (
        "gcp",
        "head_setup_commands[1]",
        replaced("google-api-python-client", ""),
        "head_setup_commands",
        "google-api-python-client",
    ),
    ("k8s", "kind", "RayService", "kind", "RayService"),
    ("k8s", "apiVersion", "ray.io/v1alpha1", "kind", "v1alpha1"),
    ("k8s", "spec.shutDownAfterJobFinishes", True, "spec.shutDownAfterJobFinishes", "'shutdownAfterJobFinishes'"),
    ("k8s", "spec.shutdownAfterJobFinishes", NOTHING, "spec.shutdownAfterJobFinishes", "costs"),
    ("k8s", "spec.entrypoint", "python train.py", "spec.entrypoint", "train.py"),
    ("k8s", "spec.runtimeEnvYAML", "env_vars: {API_KEY: abc}", "spec.runtimeEnvYAML.env_vars.API_KEY", "secret"),
    ("k8s", f"{RAYCLUSTER}.rayVersion", "2.59.0", f"{RAYCLUSTER}.rayVersion", "2.60.0"),
    ("k8s", f"{RAYCLUSTER}.authOption", {}, f"{RAYCLUSTER}.authOption", "'authOptions'"),
    ("k8s", f"{RAYCLUSTER}.authOptions", NOTHING, f"{RAYCLUSTER}.authOptions.mode", "None"),
    ("k8s", f"{RAYCLUSTER}.authOptions.mode", "disabled", f"{RAYCLUSTER}.authOptions.mode", "disabled"),
    ("k8s", f"{RAYCLUSTER}.enableInTreeAutoscaling", False, f"{RAYCLUSTER}.enableInTreeAutoscaling", "False"),
    (
        "k8s",
        f"{RAYCLUSTER}.autoscalerOptions.idleTimeoutSeconds",
        NOTHING,
        f"{RAYCLUSTER}.autoscalerOptions.idleTimeoutSeconds",
        "None",
    ),
    ("k8s", f"{HEADS}.serviceType", "LoadBalancer", f"{HEADS}.serviceType", "LoadBalancer"),
    ("k8s", f"{HEADS}.enableIngress", True, f"{HEADS}.enableIngress", "dashboard"),
    ("k8s", f"{HEADS}.rayStartParams", {}, f"{HEADS}.rayStartParams.num-cpus", "head"),
    ("k8s", f"{HEADS}.rayStartParams.num-cpus", 0, f"{HEADS}.rayStartParams.num-cpus", "quote"),
    ("k8s", f"{HEADS}.template.spec.hostNetwork", True, f"{HEADS}.template.spec.hostNetwork", "ports"),
    (
        "k8s",
        f"{HEADS}.template.spec.containers[1].command[6]",
        "--artifacts-destination=/shared/artifacts",
        f"{HEADS}.template.spec.containers[1]",
        "/shared/artifacts",
    ),
    (
        "k8s",
        f"{HEADS}.template.spec.containers[1].command[2]",
        "--host=0.0.0.0",
        f"{HEADS}.template.spec.containers[1]",
        "every interface",
    ),
    ("k8s", f"{HEADS}.template.spec.containers[1]", NOTHING, f"{HEADS}.template.spec.containers", "mlflow server"),
    (
        "k8s",
        f"{HEADS}.template.spec.containers[1].volumeMounts",
        NOTHING,
        f"{HEADS}.template.spec.containers[1]",
        "curves in 'sqlite:////shared/mlflow.db', lost",
    ),
    ("k8s", f"{WORKERS}.maxReplica", 8, f"{WORKERS}.maxReplica", "'maxReplicas'"),
    ("k8s", f"{WORKERS}.maxReplicas", NOTHING, RAYCLUSTER, "maxReplicas"),
    ("k8s", f"{WORKERS}.minReplicas", 9, RAYCLUSTER, "min_workers"),
    ("k8s", f"{WORKERS}.replicas", 9, f"{WORKERS}.replicas", "9 is not"),
    (
        "k8s",
        f"{WORKERS}.template.spec.nodeSelector",
        {"karpenter.sh/capacity-type": "spot"},
        f"{WORKERS}.template.spec.nodeSelector",
        "prefer",
    ),
    (
        "k8s",
        f"{WORKERS}.template.spec.containers[0].image",
        replaced("ray2.60.0", "ray2.59.0"),
        f"{WORKERS}.template.spec.containers[0].image",
        "2.59.0",
    ),
    (
        "k8s",
        f"{WORKERS}.template.spec.containers[0].image",
        "rayproject/ray:2.60.0-py311-gpu",
        f"{WORKERS}.template.spec.containers[0].image",
        "does not have this project",
    ),
    (
        "k8s",
        f"{WORKERS}.template.spec.containers[0].image",
        replaced("gpu", "cpu"),
        f"{WORKERS}.template.spec.containers[0].image",
        "CUDA",
    ),
    (
        "k8s",
        f"{WORKERS}.template.spec.containers[0].env",
        [{"name": "SLOTFORGE_HOME", "value": "/tmp/home"}],
        f"{WORKERS}.template.spec.containers[0].env",
        "SLOTFORGE_HOME=/tmp/home",
    ),
    (
        "k8s",
        f"{WORKERS}.template.spec.containers[0].env",
        [{"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"}],
        f"{WORKERS}.template.spec.containers[0].env[0]",
        "secretKeyRef",
    ),
    (
        "k8s",
        f"{WORKERS}.template.spec.volumes",
        [{"name": "shared", "emptyDir": {}}],
        f"{WORKERS}.template.spec.containers[0].env",
        "ReadWriteMany",
    ),
    (
        "k8s",
        f"{WORKERS}.template.spec.containers[0].resources.requests",
        {"nvidia.com/gpu": 2},
        f"{WORKERS}.template.spec.containers[0].resources.requests",
        "equal",
    ),
]


@pytest.mark.parametrize(
    ("name", "place", "value", "begins", "says"), MISTAKES, ids=[f"{m[0]} {m[1]} {m[4]}" for m in MISTAKES]
)
def test_a_mistake_is_named_with_its_place(
    name: str, place: str, value: Any, begins: str, says: str, tmp_path: Path
) -> None:
    config = load(name)
    change(config, place, value)
    found = problems_of(config, tmp_path)
    assert any(problem.startswith(begins) and says in problem for problem in found), found
    assert all(": " in problem for problem in found)


def test_values_that_nothing_should_have_are_no_crash() -> None:
    wrong = itertools.cycle((None, 7, "text", [], {}, ["x"], [7], [{}], {"a": 1}, True))
    for name in FILES:
        config, check = load(name), kuberay_problems if name == "k8s" else launcher_problems
        for holder, key in list(places(config))[:: 2 if name == "k8s" else 3]:
            before, holder[key] = holder[key], next(wrong)
            assert all(isinstance(problem, str) for problem in check(config))
            holder[key] = before
        assert not list(check(config))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everything in a file: what holds it, and under which key."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from places(value[key])


def test_rays_own_validators_are_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray.autoscaler._private.util as ray_util
    from ray.autoscaler._private.kuberay import autoscaling_config

    def refuse(config: Any) -> None:
        raise ValueError(f"refused: {sorted(config['available_node_types'])}")

    monkeypatch.setattr(ray_util, "validate_config", refuse)
    monkeypatch.setattr(autoscaling_config, "validate_config", refuse)
    assert "refused: ['gpu-on-demand', 'gpu-spot', 'head']" in str(launcher.ray_refuses(load("aws")))
    assert "refused: ['gpu', 'headgroup']" in str(kuberay.ray_refuses("spec", load("k8s")["spec"]["rayClusterSpec"]))


def test_rays_scheduler_falls_back_from_spot_by_version_2_alone() -> None:
    """What cluster.yaml promises, by Ray's schedulers: spot first, on demand while spot starts fail."""
    from functools import partial

    from ray.autoscaler._private.node_provider_availability_tracker import (
        NodeAvailabilityRecord,
        NodeAvailabilitySummary,
        UnavailableNodeInformation,
    )
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = load("aws")
    config["file_mounts"] = {}  # it would read them
    kinds = AutoscalingConfig(config).get_node_type_configs()

    def launched(availability: dict[str, float]) -> list[str]:
        wanted = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 1, "CPU": 8})] * 3)
        request = SchedulingRequest(
            node_type_configs={**kinds},
            max_num_nodes=9,
            disable_launch_config_check=True,
            resource_requests=wanted,
            cloud_resource_availabilities=availability,
            recoverable_resource_availabilities=availability,
        )
        reply = ResourceDemandScheduler(None).schedule(request)  # type: ignore[arg-type]
        return sorted(launch.instance_type for launch in reply.to_launch if launch.instance_type != "head")

    assert launched({}) == ["gpu-spot"]
    assert launched({"gpu-spot": 0.0}) == ["gpu-on-demand"]

    # Version 1 is told the same and asks for spot for ever: hence the rule about RAY_enable_autoscaler_v2.
    failed = NodeAvailabilityRecord("gpu-spot", False, 0.0, UnavailableNodeInformation("none", "left"))
    scorer = partial(
        _default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({"gpu-spot": failed})
    )
    types = prepare(config)["available_node_types"]
    nodes, _ = get_nodes_for(types, {}, "head", 8, [{"GPU": 1, "CPU": 8}] * 3, scorer)
    assert dict(nodes) == {"gpu-spot": 3}


def test_the_machines_are_as_aws_lists_them() -> None:
    moto = pytest.importorskip("moto")
    path = Path(moto.__file__).parent / "ec2/resources/instance_types.json.gz"
    known = json.loads(gzip.decompress(path.read_bytes()))
    for name, machine in AWS.items():
        has = known[name]
        gpus = sum(gpu["Count"] for gpu in has.get("GpuInfo", {}).get("Gpus", []))
        assert (name, machine.cpus, machine.gpus) == (name, has["VCpuInfo"]["DefaultVCpus"], gpus)


def test_the_small_table_of_fields_is_a_part_of_what_ec2_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from botocore.session import Session

    shape = Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    assert set(shape.members) >= RUN_INSTANCES
    nodes.run_instances.cache_clear()
    monkeypatch.setitem(sys.modules, "botocore.session", None)  # without botocore
    config = load("aws")
    assert problems_of(config, tmp_path) == []
    change(config, f"{GPU}.node_config.InstanceTyp", "g5.xlarge")
    assert any(problem.startswith(f"{GPU}.node_config.InstanceTyp") for problem in problems_of(config, tmp_path))


COMMANDS = [
    "A=1 prog x --host=h",
    "export A=1 B=2; prog x --host h",
    "cd /tmp && A=1 nohup setsid prog x --host h > log 2>&1 &",
    'export A=1 && S="$(cat f | tr a b)" prog x --host "h"',
    "A=1 S=$(cat f) prog x --host h",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_read_as_a_shell_does(command: str, tmp_path: Path) -> None:
    [start] = starts("commands[0]", command, ["prog", "x"])
    assert start.option("--host") == "h"
    program = tmp_path / "bin/prog"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$A" > "$OUT"\n')
    program.chmod(0o755)
    env = {"PATH": f"{program.parent}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    subprocess.run(["bash", "-c", f"{command.removesuffix('&')}"], env=env, cwd=tmp_path, check=True, timeout=20)
    assert start.env["A"] == (tmp_path / "out").read_text().strip() == "1"


def test_what_runs_in_the_background_is_told_from_what_is_waited_for() -> None:
    for waits in ("prog x", "prog x && next", "prog x > log 2>&1", "prog x &> log", "sleep 9 & prog x"):
        assert not in_background(waits, "prog x")
    for returns in ("prog x &", "prog x > log 2>&1 & disown", "cd / && nohup prog x&"):
        assert in_background(returns, "prog x")


def test_secrets_are_told_from_references() -> None:
    said = ["password=x", "aws_secret_access_key", "https://me:pw@host/x", "ghp_" + 36 * "a"]
    assert list(secret_problems({"command": "export MLFLOW_TRACKING_PASSWORD=x"}))
    assert list(secret_problems({"aws_secret_access_key": "abc"}))
    assert list(secret_problems({"uri": said[2]})) and list(secret_problems({"a": [said[3]]}))
    for right in ('P_PASSWORD="$(cat f)" x', "TOKEN=$T", "RAY_AUTH_TOKEN_PATH=/x", "PASSWORD= x", "https://host/x@y"):
        assert list(secret_problems({"command": right})) == []
    assert all("hunter2" not in problem for problem in secret_problems({"password": "hunter2"}))


def test_the_command_tells_and_exits(tmp_path: Path) -> None:
    runner = CliRunner()
    right = runner.invoke(app, ["cluster", "check", str(FILES["aws"])])
    assert right.exit_code == 0 and "gpu-spot: 0 to 8 g5.2xlarge (8 CPU, 1 GPU), spot" in right.output
    config = copy.deepcopy(load("aws"))
    config["max_workers"] = 0
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(config))
    wrong = runner.invoke(app, ["cluster", "check", str(path)])
    assert wrong.exit_code == 1 and "max_workers: 0" in wrong.output
    path.write_text("a: [")
    for unreadable in (path, tmp_path / "absent.yaml"):
        result = runner.invoke(app, ["cluster", "check", str(unreadable)])
        assert result.exit_code == 2 and str(unreadable) in result.output
    path.write_text("- a\n")
    with pytest.raises(ClusterFileError, match="list"):
        check_cluster(path)
