"""A cluster on one machine is found again, ended whole, and known to Ray's own autoscaler."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from orchestration.cli import app
from orchestration.clusters.local import MARK, LocalCluster, LocalClusterError, down, running, up
from orchestration.clusters.local import autoscaler_config as local_config
from orchestration.files import write_json
from orchestration.submission.cli import found_address

ROOT = Path(__file__).parents[3]


@pytest.fixture
def sleepers() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Processes of a cluster named ours, in sessions of their own as jobs are, and one of another."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.{how}); time.sleep(99)"
    made = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(how=how)], env={**os.environ, MARK: name}, start_new_session=True
        )
        for name, how in (("ours", "SIG_DFL"), ("ours", "SIG_IGN"), ("theirs", "SIG_DFL"))
    ]
    yield made
    for process in made:
        process.kill()
        process.wait()


def known(home: Path, tmp_path: Path, pid: int, started: float) -> LocalCluster:
    """A cluster that the state folder knows."""
    folder = tmp_path / "ray"
    folder.mkdir()
    cluster = LocalCluster("ours", pid, started, "http://127.0.0.1:1", "127.0.0.1:2", 2, str(home / "t"), str(folder))
    write_json(home / "local-cluster.json", vars(cluster))
    return cluster


def test_a_dead_heads_processes_are_ended_and_nobody_elses(
    home: Path, tmp_path: Path, sleepers: list["subprocess.Popen[bytes]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestration.clusters.local.END_SECONDS", 1.0)
    # The head's number belongs to another process by now: this one.
    cluster = known(home, tmp_path, os.getpid(), psutil.Process().create_time() - 1000)
    assert running() is None
    assert down() == cluster
    assert [process.poll() is None for process in sleepers] == [False, False, True]
    assert not Path(cluster.folder).exists() and not (home / "local-cluster.json").exists()
    assert down() is None


def test_a_second_cluster_is_refused_and_the_first_is_found(home: Path, tmp_path: Path) -> None:
    cluster = known(home, tmp_path, os.getpid(), psutil.Process().create_time())
    with pytest.raises(LocalClusterError, match=r"http://127\.0\.0\.1:1.*slotforge cluster down"):
        up(1)
    assert json.loads((home / "local-cluster.json").read_text()) == vars(cluster)
    address, variables = found_address({})
    assert address == cluster.address and variables["RAY_AUTH_TOKEN_PATH"] == cluster.token
    assert found_address({"RAY_ADDRESS": "http://head:8265"}) == ("http://head:8265", {})


def test_where_no_cluster_is_the_cure_is_told() -> None:
    result = CliRunner(env={"RAY_ADDRESS": "", "RAY_API_SERVER_ADDRESS": ""}).invoke(app, ["submit", "demo"])
    assert result.exit_code == 1 and "slotforge cluster up --local" in result.output
    wrong = CliRunner().invoke(app, ["submit", "demo", "--address", "http://127.0.0.1:9", "--set", "train.stepz=3"])
    assert wrong.exit_code == 2 and "train.stepz" in wrong.output
    nobody = CliRunner().invoke(app, ["submit", "demo", "--address", "http://127.0.0.1:9"])
    assert nobody.exit_code == 1 and "no Ray dashboard answers" in nobody.output
    hasty = CliRunner().invoke(app, ["submit", "demo", "--address", "http://127.0.0.1:9", "--stop-seconds", "5"])
    assert hasty.exit_code == 2 and "--stop-seconds: 5" in hasty.output
    idle = CliRunner().invoke(
        app, ["submit", "demo", "--address", "http://127.0.0.1:9", "--retries", "2", "--no-follow"]
    )
    assert idle.exit_code == 2 and "--retries: 2 needs the job to be followed" in idle.output


def test_rays_autoscaler_takes_the_local_clusters_file(tmp_path: Path) -> None:
    from ray.autoscaler._private.providers import _get_node_provider_cls
    from ray.autoscaler.v2.instance_manager.config import FileConfigReader

    path = tmp_path / "autoscaler.yaml"
    path.write_text(yaml.safe_dump(local_config(3, 6379, 0.5)))
    config = FileConfigReader(str(path), skip_content_hash=True).get_cached_autoscaling_config()
    worker = config.get_node_type_configs()["worker"]
    assert (worker.min_worker_nodes, worker.max_worker_nodes, worker.resources["CPU"]) == (0, 3, 1)
    assert config.get_idle_timeout_s() == 30
    assert _get_node_provider_cls(config.get_config("provider")).__name__ == "FakeNodes"
