"""A second run from the recipe that the first one logged, in a state folder of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
from runs import PATIENCE, Run

pytestmark = pytest.mark.slow


def test_a_second_run_from_the_logged_recipe_has_the_first_ones_curve(twin: tuple[Run, str], tmp_path: Path) -> None:
    first, _ = twin
    logged = first.client.download_artifacts(first.run_id, "recipe.yaml", str(tmp_path))
    again = Run(tmp_path / "elsewhere", "again")
    command = [sys.executable, "-m", "orchestration.train", "--recipe", logged, "--set", "name=again"]
    done = subprocess.run(
        command, env=again.environment, capture_output=True, text=True, check=False, timeout=3 * PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = again.curves(), first.curves()
    assert ours.keys() == theirs.keys()
    for name, points in theirs.items():
        assert ours[name] == points, name  # bit for bit: shards, order, noise and weights are the recipe's alone
    digests = [
        {entry.dataset.name: entry.dataset.digest for entry in run.client.get_run(run.run_id).inputs.dataset_inputs}
        for run in (first, again)
    ]
    assert digests[0] == digests[1]
