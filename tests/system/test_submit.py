"""`slotforge submit` and `ray job submit` against a head that runs already, at another world size and ZeRO stage."""

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ledgers
import pytest
from runs import PATIENCE, Run, wait
from servers import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DASHBOARD = re.compile(r"RAY_API_SERVER_ADDRESS='(http://[^']+)'")


@dataclass
class Head:
    """A head; the address of its dashboard, and what its users set."""

    address: str
    environment: dict[str, str]


@pytest.fixture
def head(home: Path) -> Iterator[Head]:
    """A head with a token of its own."""
    token = home / "head-token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    users = {**inherited, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "COLUMNS": "200"}
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])  # an activated environment
    command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
    command += ["--port=0", "--dashboard-port=0", "--dashboard-host=127.0.0.1", "--object-store-memory=100000000"]
    command += [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "ray-client-server-port")]
    log = home / "head.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env={**users, "SLOTFORGE_HOME": str(home), "PATH": path},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    wait(lambda: DASHBOARD.search(log.read_text()) is not None or process.poll() is not None)
    found = DASHBOARD.search(log.read_text())
    assert found, log.read_text()
    yield Head(found[1], users)
    process.terminate()
    process.wait(timeout=60)


@pytest.mark.slow
def test_a_job_that_is_stopped_saves_and_the_next_goes_on_with_it(twin: tuple[Run, str], head: Head) -> None:
    undisturbed, _ = twin
    run = Run(undisturbed.home, "submitted", ("parallel.workers={min: 1, max: 1}", "parallel.zero_stage=3"))
    _, _, module, _, recipe, *overrides = run.command()
    assert module == "orchestration.train"

    ours = [str(BIN / "slotforge"), "submit", recipe, *overrides, "--address", head.address, "--retries", "3"]
    with subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *ours],  # as a shell starts what it puts into the background
        env=head.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as submission:
        run.wait_for_step(60, submission)
        submission.send_signal(signal.SIGINT)
        output, _ = submission.communicate(timeout=PATIENCE)
    assert submission.returncode == 130, output  # and it was not submitted again
    assert "asking submitted-" in output and "was stopped" in output
    assert "training from step 0 on 1 worker" in output, "the ranks' own log is shown"
    saved = run.newest_step()
    assert 60 <= saved < 600
    assert f"the newest checkpoint is of step {saved}" in output

    # The same, as Ray's own command takes it.
    rays = [str(BIN / "ray"), "job", "submit", "--address", head.address, "--working-dir", str(ROOT), "--"]
    again = ["python", "-m", module, "--recipe", recipe, *overrides]
    done = subprocess.run(
        [*rays, *again], env=head.environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"training from step {saved} on 1 worker" in done.stdout
    assert "FG-ARI on 90 held-out scenes" in done.stdout

    mine, theirs = run.curves(), undisturbed.curves()
    for name in ("loss/total", "loss/reconstruction", "train/gradient_norm"):
        (step, first), (_, second) = mine[name][0], theirs[name][0]
        assert step == 10
        assert first == pytest.approx(second, rel=1e-5), name
    assert {name: [step for step, _ in points] for name, points in mine.items()} == {
        name: [step for step, _ in points] for name, points in theirs.items()
    }
    assert {value for _, value in mine["train/world_size"]} == {1.0}
    assert {value for _, value in theirs["train/world_size"]} == {2.0}


@pytest.mark.slow
def test_a_plain_job_with_the_documented_grace_saves_when_it_is_stopped(home: Path, tmp_path: Path, head: Head) -> None:
    """Without checkpoints of its own accord: what is saved is the stop's."""
    ledger = tmp_path / "ledger"
    changes = ("train.steps=300", "train.checkpoint_every=300", "evaluate.every=300", f"data.ledger={ledger}")
    run = Run(home, "plain", (*changes, "parallel.workers={min: 1, max: 1}"))
    _, _, module, _, recipe, *overrides = run.command()

    def job(verb: str, *arguments: str) -> str:
        command = [str(BIN / "ray"), "job", verb, "--address", head.address, *arguments]
        done = subprocess.run(
            command, env=head.environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    grace = re.search(r"--runtime-env-json '([^']+)'", (ROOT / "README.md").read_text())
    assert grace
    submission = ["--working-dir", str(ROOT), "--runtime-env-json", grace[1]]
    command = ["--", "python", "-m", module, "--recipe", recipe, *overrides]
    job("submit", "--no-wait", "--submission-id", "plain-1", *submission, *command)
    wait(lambda: ledgers.newest_step(ledger) >= 30)
    job("stop", "plain-1")
    saved = run.newest_step()
    assert 30 <= saved < 300
    assert f"the newest checkpoint is of step {saved}" in job("logs", "plain-1")

    assert f"training from step {saved} on" in job("submit", *submission, *command)
    for name in ("loss/total", "slots/kept_mean", "time/step"):
        assert [step for step, _ in run.points(name)] == list(range(10, 301, 10)), name
