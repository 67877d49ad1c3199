"""The head dies, and the driver with it; the same command goes on on another head."""

import os
from pathlib import Path

import pytest
from nodes import Nodes
from runs import RECIPE, Run, kill_everything

pytestmark = pytest.mark.slow


def test_a_run_goes_on_after_its_head_and_driver_were_killed(twin: tuple[Run, str]) -> None:
    undisturbed, _ = twin
    run = Run(undisturbed.home, "beheaded")
    with Nodes(Path(f"/tmp/slotforge-head-{os.getpid()}")) as cluster:
        run.cluster = cluster.environment
        cluster.add("one")
        cluster.add("two")
        driver = run.start()
        run.wait_for_step(60, driver)
        head = cluster.nodes[0]
        head.kill()  # GCS, raylet and all: its nodes, and the ranks on them, are alone
        kill_everything(driver)
    saved = run.newest_step()
    assert 60 <= saved < RECIPE["train"]["steps"], "this came too late to test anything"

    with Nodes(Path(f"/tmp/slotforge-head-{os.getpid()}-2")) as cluster:
        run.cluster = cluster.environment
        cluster.add("one")
        cluster.add("two")
        code, output = run.finish(run.start())
    assert code == 0, output
    assert f"going on from step {saved}" in output

    ours, theirs = run.curves(), undisturbed.curves()
    assert ours.keys() == theirs.keys()
    for name, points in theirs.items():
        assert ours[name] == points, name  # each step once, and bit for bit: the world size did not change
