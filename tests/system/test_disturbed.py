"""A run that is killed, interrupted and damaged on its way has the curve of its undisturbed twin."""

import os
import signal
from pathlib import Path

from runs import RECIPE, Run, actors, kill_everything, wait, workers

from orchestration.runs.folder import RunFolder
from orchestration.runs.lease import Lease

STEPS = RECIPE["train"]["steps"]


def test_kills_interrupts_and_a_torn_checkpoint_leave_no_trace_in_the_curve(twin: tuple[Run, str]) -> None:
    undisturbed, _ = twin
    run = Run(undisturbed.home, "disturbed")

    # kill -9 of a worker: the run goes on by itself.
    driver = run.start()
    run.wait_for_step(60, driver)
    victims = workers(driver)
    assert len(victims) == 2
    assert all("MALLOC_ARENA_MAX" in rank.environ() for rank in victims), "every step maps its memory anew"
    rays = {"DashboardAgent", "RuntimeEnvAgent", "IDLE"}
    assert actors(driver) - rays == {"Mailbox", "TrainController", "RayTrainWorker"}, "each takes half a percent"
    victims[1].kill()
    at_kill = run.newest_step()
    run.wait_for_step(at_kill + 30, driver)

    # Ctrl-C: the workers save first.
    at_stop = run.newest_step()
    os.kill(driver.pid, signal.SIGINT)
    code, output = run.finish(driver)
    assert code == 130, output
    assert run.newest_step() > at_stop
    assert f"the newest checkpoint is of step {run.newest_step()}" in output
    assert "the same command goes on from the last checkpoint" in output
    assert run.client.get_run(run.run_id).info.status == "KILLED"
    assert run.newest_step() < STEPS, "the interrupt came too late to test anything"

    # The newest checkpoint is torn; then kill -9 of the driver.
    newest = max(run.folder.glob("checkpoints/[0-9]*/manifest.json")).parent
    part = newest / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    torn = run.newest_step()
    driver = run.start()
    wait(lambda: (newest.parent / f"damaged-{newest.name}").exists() or driver.poll() is not None)
    run.wait_for_step(torn, driver)
    kill_everything(driver)
    before = run.newest_step()
    assert run.newest_step() < STEPS, "the kill came too late to test anything"

    # The same command once more, to the end.
    code, output = run.finish(run.start())
    assert code == 0, output
    assert f"going on from step {before}" in output

    ours, theirs = run.curves(), undisturbed.curves()
    assert ours.keys() == theirs.keys()
    for name, points in theirs.items():
        assert ours[name] == points, name  # each step once, and bit for bit: the world size did not change


def test_a_second_driver_is_refused_while_the_first_one_lives(home: Path) -> None:
    run = Run(home, "held")
    with Lease(RunFolder(run.folder)):
        code, output = run.finish(run.start())
    assert code == 3, output
    assert f"process {os.getpid()} on" in output
