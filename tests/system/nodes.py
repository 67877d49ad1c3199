"""A real Ray cluster of several nodes on this machine: each one a raylet that can be killed, drained or joined."""

import json
import os
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from runs import wait
from servers import free_port

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass
class Node:
    """A node of the cluster, by the `ray start` that holds it."""

    process: "subprocess.Popen[bytes]"
    name: str

    def kill(self) -> None:
        """kill -9 of everything on it, as when a machine loses its power."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=20)
        self.process.wait()


@dataclass
class Nodes:
    """A head without CPUs, and nodes with one each. A context manager; what it started has ended when it is left."""

    home: Path
    port: int = field(default_factory=free_port)
    nodes: list[Node] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What every process that speaks to the cluster needs."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.home / "token"),
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
        }

    def __enter__(self) -> "Nodes":
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "token").write_text(secrets.token_hex(32))
        (self.home / "token").chmod(0o600)
        head = ["--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false"]
        head.append(f"--ray-client-server-port={free_port()}")
        self._start("head", [*head, f"--temp-dir={self.home / 'ray'}"])
        return self

    def add(self, name: str) -> Node:
        """Joins a node; returns when the cluster counts it."""
        known = len(self._alive())
        label = f'--resources={{"{name}": 1}}'
        node = self._start(name, [f"--address=127.0.0.1:{self.port}", "--num-cpus=1", label])
        wait(lambda: len(self._alive()) > known)
        return node

    def drain(self, name: str, seconds: int) -> None:
        """Tells the cluster that a node will go: what a watcher of a cloud's spot notices says."""
        identity = next(node["node_id"] for node in self._alive() if name in node["resources_total"])
        command = [RAY, "drain-node", f"--address=127.0.0.1:{self.port}", f"--node-id={identity}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot notice"]
        self._run([*command, f"--deadline-remaining-seconds={seconds}"])

    def __exit__(self, *error: object) -> None:
        for node in reversed(self.nodes):
            if node.process.poll() is None:
                node.kill()

    def _start(self, name: str, arguments: list[str]) -> Node:
        log = (self.home / f"{name}.log").open("wb")
        command = [
            RAY,
            "start",
            "--block",
            "--node-ip-address=127.0.0.1",
            "--object-store-memory=100000000",
            *arguments,
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | self.environment
        del environment["RAY_ADDRESS"]
        process = subprocess.Popen(
            [*command, *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        wait(lambda: process.poll() is not None or b"--block" in (self.home / f"{name}.log").read_bytes())
        assert process.poll() is None, (self.home / f"{name}.log").read_text()
        self.nodes.append(Node(process, name))
        return self.nodes[-1]

    def _alive(self) -> list[dict]:
        program = (
            "import json, ray; from ray._private.state import state\n"
            "from ray._raylet import GcsClientOptions\n"
            f"state._initialize_global_state(GcsClientOptions.create('127.0.0.1:{self.port}', None, True, False))\n"
            "print(json.dumps([{'node_id': n['NodeID'], 'resources_total': n['Resources']}"
            " for n in ray.nodes() if n['Alive']]))"
        )
        return json.loads(self._run([sys.executable, "-c", program]).splitlines()[-1])

    def _run(self, command: list[str]) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def pause(process: psutil.Process) -> None:
    """SIGSTOP: it neither works nor ends."""
    os.kill(process.pid, signal.SIGSTOP)
