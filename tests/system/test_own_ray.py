"""The Ray that a run starts for itself is not to be reached from elsewhere, and is no more than a run needs."""

import json
import os
import subprocess
import sys
from ipaddress import ip_address

import pytest

PROGRAM = """
import json, os, psutil
from orchestration.clusters.connection import ray_cluster

with ray_cluster(workers=2):
    import ray  # once it has its token

    ray.get([ray.remote(lambda: None).remote() for _ in range(4)])
    children = psutil.Process().children(recursive=True)
    ours = {os.getpid(), *(child.pid for child in children)}
    listening = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.pid in ours]
    commands = [" ".join(child.cmdline()) for child in children]
    print(json.dumps({"addresses": [each.laddr.ip for each in listening], "commands": commands}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The addresses that a local Ray listens on, and the commands of its processes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["SLOTFORGE_HOME"] = str(tmp_path_factory.mktemp("home"))
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_server_listens_on_loopback(found: dict[str, list[str]]) -> None:
    addresses = [ip_address(address.removeprefix("::ffff:")) for address in found["addresses"]]
    assert len(addresses) >= 5, "GCS, raylet, agents, workers"
    assert all(address.is_loopback for address in addresses), addresses


def test_nothing_runs_that_training_does_without(found: dict[str, list[str]]) -> None:
    needed, commands = ("gcs_server", "raylet/raylet", "Agent", "ray::"), [each for each in found["commands"] if each]
    assert all(any(name in command for command in commands) for name in needed), commands
    assert [each for each in commands if not any(name in each for name in needed)] == []
