"""The demo's recipe learns what it promises. Minutes of training, so it is part of make test-all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest


@pytest.mark.slow
def test_the_demo_finds_the_pieces_and_decides_how_many_slots_they_need(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orchestration.train", "--recipe", "demo"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    done = subprocess.run(
        command, env={**environment, "SLOTFORGE_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=2400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "runs" / "demo" / "run.json").read_text())
    metrics = mlflow.MlflowClient(facts["mlflow"]["uri"]).get_run(facts["mlflow"]["run"]).data.metrics
    assert metrics["final/fg_ari"] >= 0.80
    assert metrics["final/count_error"] <= 0.45 < metrics["final/count_error_of_best_constant"]
    assert metrics["final/count_correlation"] >= 0.5
    assert "slotforge-demo version 1, champion" in done.stdout
