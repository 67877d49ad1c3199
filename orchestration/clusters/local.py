"""A cluster of several nodes on one machine, to try growing, node loss and preemption: Ray's autoscaler in front of
nodes that are processes."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestration.clusters.connection import token_file
from orchestration.files import read_json, write_json
from orchestration.recipe import state_home

START_SECONDS = 120.0
END_SECONDS = 15.0
IDLE_MINUTES = 1.0
OBJECT_STORE = 100 * 2**20
"""Bytes of a node's; shards are read from files, and Ray carries next to nothing."""

MARK = "SLOTFORGE_LOCAL_CLUSTER"
"""A variable that every process of a cluster inherits, with the cluster's name: what is reaped has it."""
_HEAD_ID = f"{0:05}".rjust(56, "f")  # the fake provider's


class LocalClusterError(Exception):
    """The local cluster cannot be started or found; the message says why."""


@dataclass(frozen=True)
class LocalCluster:
    """One that was started here.

    Fields:
        name: of its own, random.
        pid, started: of the head, and when it began, to tell it from a later process of that number.
        address: the dashboard's, to which jobs are submitted.
        gcs: host and port of Ray's own server.
        nodes: the most workers.
        token: file of its token.
        folder: Ray's temporary one.
    """

    name: str
    pid: int
    started: float
    address: str
    gcs: str
    nodes: int
    token: str
    folder: str

    def environment(self) -> dict[str, str]:
        """What Ray's own commands need to reach it."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's words for: on loopback
        }

    def is_alive(self) -> bool:
        try:
            head = psutil.Process(self.pid)
            return bool(head.create_time() == self.started) and head.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def running() -> LocalCluster | None:
    """The cluster that is up, if one is."""
    known = _known()
    return known if known is not None and known.is_alive() else None


def up(nodes: int, idle_minutes: float = IDLE_MINUTES) -> LocalCluster:
    """Starts a head without CPUs, and an autoscaler that brings up to so many workers with a CPU each.

    Raises:
        LocalClusterError: one is up, or it does not start.
    """
    if (known := _known()) is not None:
        if known.is_alive():
            raise LocalClusterError(f"a local cluster is up at {known.address}; end it with: slotforge cluster down")
        _end(known)  # its head has died
    name, folder = secrets.token_hex(4), tempfile.mkdtemp(prefix="slotforge-", dir="/tmp")
    gcs, dashboard, agent, client = _free_ports(4)
    token = token_file(state_home() / "ray-token")
    config = Path(folder) / "autoscaler.yaml"
    config.write_text(yaml.safe_dump(autoscaler_config(nodes, gcs, idle_minutes)))
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--temp-dir={folder}", f"--autoscaling-config={config}", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"),
        *("--num-cpus=0", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE}"),
    ]
    me = psutil.Process()
    cluster = LocalCluster(
        name, me.pid, me.create_time(), f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", nodes, str(token), folder
    )
    _take(cluster)  # with this process for its head, until there is one
    log = Path(folder) / "head.log"
    with log.open("w") as file:
        head = subprocess.Popen(  # noqa: S603 our own command
            command,
            env={**_plain_environment(), **cluster.environment(), **_head_environment(name)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        cluster = LocalCluster(
            **{**asdict(cluster), "pid": head.pid, "started": psutil.Process(head.pid).create_time()}
        )
        write_json(_state_file(), asdict(cluster))
        _wait_until_it_answers(cluster, head, log)
    except BaseException:
        _end(cluster)
        raise
    return cluster


def down() -> LocalCluster | None:
    """Ends the cluster and all that runs on it, a head that has died included; None: there is none."""
    known = _known()
    if known is not None:
        _end(known)
    return known


def node_ids(count: int) -> list[str]:
    """Of the first workers that come: the fake provider counts."""
    return [f"{number:05}".rjust(56, "f") for number in range(1, count + 1)]


def autoscaler_config(nodes: int, gcs: int, idle_minutes: float) -> dict[str, Any]:
    """As `ray up` would write it, whole: the defaults of the fake provider are missing from Ray's wheel."""
    commands = ("setup_commands", "initialization_commands")
    of_each = [f"{role}_{what}" for role in ("head", "worker") for what in ("setup_commands", "start_ray_commands")]
    return {
        "cluster_name": "slotforge-local",
        "max_workers": nodes,
        "idle_timeout_minutes": idle_minutes,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "orchestration.clusters.fake_nodes.FakeNodes",
            "gcs_address": f"127.0.0.1:{gcs}",
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": OBJECT_STORE},
                "node_config": {},
                "min_workers": 0,
                "max_workers": nodes,
            },
        },
        **{name: [] for name in (*commands, *of_each, "cluster_synced_files")},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
    }


def _head_environment(name: str) -> dict[str, str]:
    return {
        MARK: name,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",  # as in cluster.yaml
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # down means at once
        "SLOTFORGE_HOME": str(state_home()),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def _plain_environment() -> dict[str, str]:
    """Without what another Ray has set."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def _wait_until_it_answers(cluster: LocalCluster, head: "subprocess.Popen[bytes]", log: Path) -> None:
    request = urllib.request.Request(f"{cluster.address}/api/version")  # noqa: S310 http, on loopback
    request.add_header("Authorization", f"Bearer {Path(cluster.token).read_text().strip()}")
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if head.poll() is not None:
            raise LocalClusterError(f"Ray did not start; its last words:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(request, timeout=5):  # noqa: S310
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise LocalClusterError(f"Ray did not start within {START_SECONDS:.0f} s; its last words:\n{_tail(log)}")


def _end(cluster: LocalCluster) -> None:
    """The head first, which ends its own processes; then what is left of the cluster, by process id."""
    if cluster.pid != os.getpid() and cluster.is_alive():
        _ask_to_end([psutil.Process(cluster.pid)])
    while family := list(_family(cluster.name)):
        _ask_to_end(family)
    shutil.rmtree(cluster.folder, ignore_errors=True)
    _state_file().unlink(missing_ok=True)


def _ask_to_end(processes: list[psutil.Process]) -> None:
    for process in processes:
        _signal(process.terminate)
    _, alive = psutil.wait_procs(processes, timeout=END_SECONDS)
    for process in alive:
        _signal(process.kill)
    psutil.wait_procs(alive, timeout=END_SECONDS)


def _signal(send: Any) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        return


def _family(name: str) -> Iterator[psutil.Process]:
    """The processes of a cluster: nodes, workers, drivers of jobs."""
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and process.environ().get(MARK) == name
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # gone meanwhile, or another user's
            continue


def _take(cluster: LocalCluster) -> None:
    path = _state_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x") as file:
            json.dump(asdict(cluster), file)
    except FileExistsError:
        raise LocalClusterError(f"{path}: another local cluster is just being started; wait for it") from None


def _known() -> LocalCluster | None:
    path = _state_file()
    return LocalCluster(**read_json(path)) if path.is_file() else None


def _state_file() -> Path:
    return state_home() / "local-cluster.json"


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-20:])
