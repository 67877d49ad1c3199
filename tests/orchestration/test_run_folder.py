"""Who a run is, and who may write it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestration import run_folder
from orchestration.recipe import Recipe, RecipeError
from orchestration.run_folder import Lease, LeaseHeldError, LeaseLostError, RunFolder, check_lease

HOLD = """
import sys, time
from pathlib import Path
from orchestration.run_folder import Lease, RunFolder
with Lease(RunFolder(Path(sys.argv[1]))) as lease:
    print(lease.number, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def holder(folder: RunFolder) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip().isdigit()
    return process


def test_a_second_driver_is_refused_and_told_who_holds_the_run(folder: RunFolder) -> None:
    process = holder(folder)
    try:
        with pytest.raises(LeaseHeldError, match=f"process {process.pid} on "), Lease(folder):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_killed_driver_is_succeeded_at_once_by_a_larger_number(folder: RunFolder) -> None:
    process = holder(folder)
    process.kill()
    process.wait()
    with Lease(folder) as lease:
        assert lease.number == 2
        check_lease(folder, 2)
        with pytest.raises(LeaseLostError, match="driver 2 has taken over from driver 1"):
            check_lease(folder, 1)


def test_a_lease_that_was_returned_is_free(folder: RunFolder) -> None:
    for number in (1, 2, 3):
        with Lease(folder) as lease:
            assert lease.number == number


def test_another_machines_driver_counts_as_dead_without_a_heartbeat(folder: RunFolder) -> None:
    path = folder.path / "leases" / "000001.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "since": "today"}))
    with pytest.raises(LeaseHeldError, match="process 1 on elsewhere"), Lease(folder):
        pass
    long_ago = time.time() - run_folder.LEASE_SECONDS - 1
    os.utime(path, (long_ago, long_ago))
    with Lease(folder) as lease:
        assert lease.number == 2


def test_a_driver_that_died_before_it_wrote_its_name_is_succeeded(folder: RunFolder) -> None:
    path = folder.path / "leases" / "000001.json"
    path.parent.mkdir(parents=True)
    path.write_text("")
    with pytest.raises(LeaseHeldError), Lease(folder):  # it may be about to write it
        pass
    long_ago = time.time() - run_folder.LEASE_SECONDS - 1
    os.utime(path, (long_ago, long_ago))
    with Lease(folder) as lease:
        assert lease.number == 2


def test_a_changed_recipe_under_an_existing_name_names_the_fields(recipe: Recipe, home: Path) -> None:
    folder = RunFolder.of(recipe)
    folder.claim(recipe)
    folder.claim(recipe)
    other = recipe.model_copy(update={"seed": 7, "train": recipe.train.model_copy(update={"batch_size": 8})})
    with pytest.raises(RecipeError, match=r"seed: 0 there, 7 here; train.batch_size: 16 there, 8 here.*--fresh"):
        folder.claim(other)


def test_a_run_put_aside_is_whole_and_its_name_is_free(recipe: Recipe, home: Path) -> None:
    folder = RunFolder.of(recipe)
    with Lease(folder):
        folder.claim(recipe)
        (folder.checkpoints / "000000004-a").mkdir(parents=True)
        aside = folder.put_aside()
        assert folder.facts == {}
    assert aside.name == "small~1"
    assert (aside / "checkpoints" / "000000004-a").is_dir()
    assert json.loads((aside / "run.json").read_text())["digest"] == recipe.digest()
