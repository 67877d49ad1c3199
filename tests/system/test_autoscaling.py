"""A job on a cluster without workers: they come for it, train it, and go when they are idle."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import PATIENCE, Run, wait

from orchestration.clusters.local import LocalCluster, down, running, up

BIN = Path(sys.executable).parent
IDLE_MINUTES = 0.25


@pytest.fixture
def cluster(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """What `slotforge cluster up --local 2` starts, less patient with idle nodes."""
    monkeypatch.setenv("SLOTFORGE_HOME", str(home))
    found = up(2, IDLE_MINUTES)
    yield found
    down()


def nodes(cluster: LocalCluster) -> list[dict[str, Any]]:
    """All that there ever were, as Ray's dashboard lists them."""
    request = urllib.request.Request(f"{cluster.address}/api/v0/nodes")
    request.add_header("Authorization", f"Bearer {Path(cluster.token).read_text()}")
    with urllib.request.urlopen(request, timeout=60) as answer:
        listed: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
    return listed


def workers(cluster: LocalCluster) -> int:
    return sum(node["state"] == "ALIVE" and not node["is_head_node"] for node in nodes(cluster))


@pytest.mark.slow
def test_a_cluster_grows_from_nothing_trains_and_shrinks_again(home: Path, cluster: LocalCluster) -> None:
    assert running() == cluster
    wait(lambda: len(nodes(cluster)) > 0)
    [head] = nodes(cluster)
    assert head["is_head_node"]
    assert "CPU" not in head["resources_total"], "a rank has no place on the head"

    # auto and the cores of a rank have to be known before there is a worker to look at.
    changes = ("parallel.device=auto", "train.steps=60", "train.gate_from=30", "evaluate.every=60")
    run = Run(home, "scaled", changes)
    _, _, _, _, recipe, *overrides = run.command()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    submission = subprocess.Popen(
        [str(BIN / "slotforge"), "submit", recipe, *overrides],  # it finds the local cluster, and its token, by itself
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = {0}
    deadline = time.monotonic() + 2 * PATIENCE
    while submission.poll() is None and time.monotonic() < deadline:
        seen.add(workers(cluster))
        time.sleep(1)
    assert submission.poll() is not None, "the job takes too long"
    output = submission.communicate()[0]
    assert submission.returncode == 0, output
    assert max(seen) == 2, "as many as the recipe has workers, and no more"
    assert "training from step 0 on 2 workers" in output
    assert run.newest_step() == 60
    assert {value for _, value in run.points("train/world_size")} == {2.0}

    deadline = time.monotonic() + IDLE_MINUTES * 60 + PATIENCE
    while workers(cluster) > 0:
        assert time.monotonic() < deadline, "idle nodes stay"
        time.sleep(1)
    assert all("idle" in node["state_message"] for node in nodes(cluster) if not node["is_head_node"])
