"""Promotion and rollback through a real MLflow server, which takes less than a store in a file does."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from made_up import new

from orchestration.registry.promote import CHAMPION, moved_by_hand, rollback

pytestmark = pytest.mark.slow
PATIENCE = 240


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"),
        *("--artifacts-destination", str(tmp_path / "artifacts")),
    ]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_there_and_back(server: str) -> None:
    client = mlflow.MlflowClient(server, registry_uri=server)
    registry = new(client, "served")
    first, better, worse = registry.add(0.8), registry.add(0.9), registry.add(0.7)
    assert registry.promote(first, floors={"fg_ari": 0.75}).champion
    assert registry.promote(better).champion
    assert not registry.promote(worse).champion
    assert registry.aliases() == (better, first)
    assert moved_by_hand(client, "served") is None
    assert rollback(client, "served") == (first, better)
    assert registry.aliases() == (first, better)
    client.set_registered_model_alias("served", CHAMPION, worse)
    assert "champion is version 3, the last decision says version 1" in str(moved_by_hand(client, "served"))
    assert client.search_model_versions("name = 'served.promotions'") == [], "nobody holds the lock any more"
