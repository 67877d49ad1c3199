"""`ray job submit` against a head that runs already, at another world size and ZeRO stage than the twin's."""

import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import PATIENCE, Run, wait

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head with a token of its own; its dashboard's address."""
    token = home / "head-token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", "--port=0", "--num-cpus=2", "--dashboard-port=0"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # the default is taken where another Ray runs
    log = home / "head.log"
    with log.open("w") as file:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # an activated environment
        environment = {**os.environ, "SLOTFORGE_HOME": str(home), "COLUMNS": "200", "PATH": path}
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    address: list[str] = []

    def started() -> bool:
        address[:] = re.findall(r"RAY_API_SERVER_ADDRESS='(http://[^']+)'", log.read_text())
        return bool(address) or process.poll() is not None

    wait(started)
    assert address, log.read_text()
    yield address[0]
    process.terminate()
    process.wait(timeout=60)


def submit(address: str, arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """`ray job submit`, as a user types it. A head takes jobs a few seconds after it has told its address."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--", *arguments]
    deadline = time.monotonic() + PATIENCE
    while True:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            return done


def test_a_submitted_job_runs_the_same_recipe_and_sees_the_same_data(twin: tuple[Run, str], head: str) -> None:
    undisturbed, _ = twin
    run = Run(undisturbed.home, "submitted")
    other = ["parallel.workers={min: 1, max: 1}", "parallel.zero_stage=3"]
    arguments = run.command(*(part for override in other for part in ("--set", override)))[1:]
    done = submit(head, ["python", *arguments])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FG-ARI on 90 held-out scenes" in done.stdout

    ours, theirs = run.curves(), undisturbed.curves()
    for name in ("loss/total", "loss/reconstruction", "train/gradient_norm"):
        (step, first), (_, second) = ours[name][0], theirs[name][0]
        assert step == 10
        assert first == pytest.approx(second, rel=1e-5), name
    assert {name: [step for step, _ in points] for name, points in ours.items()} == {
        name: [step for step, _ in points] for name, points in theirs.items()
    }
    assert {value for _, value in ours["train/world_size"]} == {1.0}
    assert {value for _, value in theirs["train/world_size"]} == {2.0}
