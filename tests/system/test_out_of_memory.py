"""A run that runs out of memory goes on with half the micro batch: the same batch, the same curve."""

import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from runs import Run, wait, workers

from orchestration.assembly import Data, build_model, training_stream
from orchestration.curves import Curves
from orchestration.engine import PlainEngine
from orchestration.periodic_evaluation import PeriodicEvaluation
from orchestration.recipe import load_recipe
from orchestration.schedule import Schedule
from orchestration.worker import train

pytestmark = pytest.mark.slow
CHANGES = (
    *("train.steps=400", "train.batch_size=63", "train.gate_from=20", "train.checkpoint_every=5"),
    *("evaluate.every=200", "tracking.every=1"),
)
LARGE, HALF = 32, 16  # of the 63 images, two ranks get 32 and 31
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc returns each tensor's memory at once, and asks for it anew


def too_little(rank: psutil.Process) -> int:
    """Bytes of address space in which this rank's steps have no room, but half of their tensors would."""
    seen = []
    for _ in range(1000):
        seen.append(rank.memory_info().vms)
        time.sleep(0.002)
    between, most = min(seen), max(seen)
    assert most - between > 20e6, "a step takes so little that other things would not fit either"
    return between + round(0.75 * (most - between))


def starve(driver: "subprocess.Popen[str]") -> None:
    """Leaves a rank without memory until it ends; torch itself may crash of it, and the workers come back as always."""
    _, starved = workers(driver)
    starved.rlimit(psutil.RLIMIT_AS, (too_little(starved), psutil.RLIM_INFINITY))
    wait(lambda: driver.poll() is not None or not starved.is_running())
    wait(lambda: driver.poll() is not None or len(workers(driver)) == 2)


def undisturbed(run: Run) -> dict[str, list[tuple[int, float]]]:
    """The curves of the same steps in one plain process that has always used the smaller micro batches."""
    recipe = load_recipe(str(run.home / "chain.yaml"), [*CHANGES, f"train.micro_batch={HALF}"])
    (folder,) = run.home.glob("data/*/train")
    model = build_model(recipe)
    engine = PlainEngine(model, clip_norm=recipe.train.clip_norm)
    curves, schedule = Curves(engine, 1, recipe.model.num_slots), Schedule(recipe.train)
    evaluation = PeriodicEvaluation(recipe, engine, Data(folder, folder.parent / "eval").eval, schedule, curves)
    with training_stream(recipe, folder, model.noise_shapes()) as stream:
        train(engine, stream, schedule, hooks=[curves.record, evaluation])
    found: dict[str, list[tuple[int, float]]] = {}
    for name, value, _, step in curves.take():
        found.setdefault(name, []).append((step, value))
    return found


def test_a_rank_without_memory_halves_the_micro_batch_and_keeps_the_curve(home: Path) -> None:
    run = Run(home, "memory", CHANGES, EXACT)
    driver = run.start()
    run.wait_for_step(10, driver)
    while driver.poll() is None and "out of memory" not in (run.folder / "events.jsonl").read_text():
        starve(driver)
    code, output = run.finish(driver)
    assert code == 0, output
    assert "Traceback" not in output, output
    said = re.findall(r"out of memory: micro batches of (\d+) from now on", output)
    assert said == [str(HALF)], output
    assert output.count("workers start anew: ") == 1, output

    ours, theirs = run.curves(), undisturbed(run)
    for name in ("loss/total", "loss/reconstruction", "loss/keep", "slots/kept_mean", "eval/fg_ari"):
        assert [step for step, _ in ours[name]] == [step for step, _ in theirs[name]], name
    away = [abs(a - b) / b for (_, a), (_, b) in zip(ours["loss/total"], theirs["loss/total"], strict=True)]
    assert max(away[:5]) < 1e-5, away
    assert max(away[:60]) < 1e-2, away
