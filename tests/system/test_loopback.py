"""The Ray that a run starts for itself is not to be reached from elsewhere."""

import json
import os
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

PROGRAM = """
import json, os, psutil
from orchestration.clusters.connection import ray_cluster

with ray_cluster(workers=2):
    import ray  # once it has its token

    ray.get([ray.remote(lambda: None).remote() for _ in range(4)])
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    listening = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.pid in ours]
    print(json.dumps([each.laddr.ip for each in listening]))
"""


def test_every_server_of_a_local_ray_listens_on_loopback(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["SLOTFORGE_HOME"] = str(tmp_path)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = [ip_address(address.removeprefix("::ffff:")) for address in json.loads(done.stdout.splitlines()[-1])]
    assert len(found) >= 5, "GCS, raylet, agents, workers"
    assert all(address.is_loopback for address in found), found
