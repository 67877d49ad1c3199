"""Every kind of mistake in a cluster file is found, and named with its place."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_files import FILES, GPU, HEAD, NOTHING, change, load, problems_of

from orchestration.clusters.kuberay import kuberay_problems
from orchestration.clusters.launcher import launcher_problems


def replaced(old: str, new: str) -> Callable[[str], str]:
    def replace(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return replace


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
