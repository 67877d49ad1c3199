"""Cluster files are checked by Ray's own code and by ours, and the project's own are right."""

import copy
import gzip
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_files import FILES, GPU, ROOT, change, load, problems_of
from typer.testing import CliRunner

from orchestration.cli import app
from orchestration.clusters import kuberay, launcher, nodes
from orchestration.clusters.check import ClusterFileError, check_cluster
from orchestration.clusters.launcher import prepare
from orchestration.clusters.machines import AWS, RUN_INSTANCES
from orchestration.clusters.rules import pinned_ray, secret_problems


@pytest.mark.parametrize("name", FILES)
def test_the_projects_files_are_right(name: str) -> None:
    verdict = check_cluster(FILES[name])
    assert verdict.problems == ()
    assert any("idle" in fact for fact in verdict.right) and any("token" in fact for fact in verdict.right)
    assert any("YOUR-BUCKET" in place for place in verdict.open)


def test_the_version_is_the_one_that_the_project_pins() -> None:
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert pinned_ray() == next(pin.partition("==")[2] for pin in pins if pin.startswith("ray["))


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
