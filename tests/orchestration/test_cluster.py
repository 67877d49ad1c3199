"""cluster.yaml passes Ray's own checks, and the Ray that we start keeps its token to its owner."""

import stat
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestration.cluster import token_file

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


def test_ray_accepts_the_cluster() -> None:
    config = prepare_config(yaml.safe_load(CLUSTER.read_text()))
    validate_config(config)
    assert config["max_workers"] >= config["available_node_types"]["gpu"]["max_workers"]


def test_ray_would_refuse_a_wrong_one() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    config["idle_timeout"] = 3
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(config))


def test_the_cluster_runs_the_ray_that_the_project_pins() -> None:
    import tomllib

    pinned = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    version = next(line.partition("==")[2] for line in pinned if line.startswith("ray["))
    assert f":{version}-py311" in yaml.safe_load(CLUSTER.read_text())["docker"]["image"]


def test_nothing_of_the_cluster_is_public() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    assert config["provider"]["use_internal_ips"] is True
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert any("--dashboard-host=127.0.0.1" in command for command in starts)


def test_a_token_is_readable_by_its_owner_alone_and_stays_the_same(tmp_path: Path) -> None:
    path = token_file(tmp_path / "state" / "ray-token")
    token = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) == 64
    assert token_file(path).read_text() == token
