"""The Ray that we start keeps its token to its owner; one that does not answer is told in a sentence."""

import os
import stat
import subprocess
import sys
from pathlib import Path

from servers import free_port

from orchestration.clusters.connection import token_file


def test_a_token_is_readable_by_its_owner_alone_and_stays_the_same(tmp_path: Path) -> None:
    path = token_file(tmp_path / "state" / "ray-token")
    token = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) == 64
    assert token_file(path).read_text() == token


def test_a_cluster_that_does_not_answer_is_told_in_a_sentence(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    token = str(token_file(tmp_path / "token"))
    settings = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
    impatient = dict.fromkeys(
        ("py_gcs_connect_timeout_s", "gcs_rpc_server_connect_timeout_s", "NUM_REDIS_GET_RETRIES"), "1"
    )
    settings |= {f"RAY_{name}": value for name, value in impatient.items()}
    done = subprocess.run(
        [sys.executable, "-m", "orchestration.train", "--recipe", "demo"],
        env={**os.environ, **settings, "SLOTFORGE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"RAY_ADDRESS: no Ray answers at {address}" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
