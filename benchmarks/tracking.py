"""What logging costs training: python -m benchmarks.tracking [--recipe demo] [--steps 200] [--write]

The recipe's model is trained in this process, one thread, on images that are made up, with the hook that records its
curves; every so many steps the points are taken, as a checkpoint takes them. Their time, and that of a step's part of
the curves, is set against the steps' own, in the same process, so that other work on the machine slows both.

Sending is not in a step: the driver does it in another process. Its processor time is told a step too, since on one
machine it competes for the same cores: into a fresh sqlite store, which is the slowest.

Pictures are told apart: what rank 0 does for them at an evaluation, and what the driver takes to draw and send them,
which it does for at most 2 % of the time while a run trains.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.page import machine, versions, write
from orchestration import worker
from orchestration.assembly import build_model
from orchestration.curves import Curves
from orchestration.engine import PlainEngine
from orchestration.glimpse import FirstScenes, Glimpse
from orchestration.planning.measure import synthetic_batch
from orchestration.recipe import Recipe, load_recipe
from orchestration.runs.checkpoints import Points
from orchestration.runs.folder import RunFolder
from orchestration.schedule import Schedule
from orchestration.tracking import Tracker
from orchestration.tracking.gallery import Gallery
from orchestration.worker import StepReport, train
from pipelines.stream import MicroBatch
from slot_models import SlotCounts, count_confusion

CHECKPOINT_STEPS = 50  # from one taking of points to the next
DRAWN = 5  # evaluations


class Batches:
    """One micro batch, again and again."""

    waited = 0.0

    def __init__(self, micro: MicroBatch) -> None:
        self._micro = micro

    def batch_size(self, step: int) -> int:
        return len(self._micro.weight)

    def step(self, step: int) -> list[MicroBatch]:
        return [self._micro]


@dataclass
class Clock:
    """Seconds of calls, and their processor time in this thread."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def __call__(self, call: Callable[..., Any], *arguments: Any) -> Any:
        began, cpu = time.perf_counter(), time.thread_time()
        result = call(*arguments)
        self.seconds.append(time.perf_counter() - began)
        self.cpu.append(time.thread_time() - cpu)
        return result


def measured(recipe: Recipe, steps: int, images: int) -> Iterator[tuple[str, str]]:
    """(what, how much) of everything."""
    model = build_model(recipe)
    micro = synthetic_batch(recipe, model, images)
    engine = PlainEngine(model, clip_norm=recipe.train.clip_norm)
    curves = Curves(engine, recipe.tracking.every, recipe.model.num_slots)
    recording, taking = Clock(), Clock()
    step_seconds: list[float] = []
    step_cpu: list[float] = []
    points: Points = []
    since = time.thread_time()

    def record(report: StepReport) -> None:
        nonlocal since
        step_seconds.append(report.seconds)
        step_cpu.append(time.thread_time() - since)
        recording(curves.record, report)
        if report.done % CHECKPOINT_STEPS == 0:
            points.extend(taking(curves.take))
        since = time.thread_time()

    schedule = Schedule(recipe.train.model_copy(update={"steps": recipe.train.gate_from + steps}))
    train(engine, Batches(micro), schedule, start=recipe.train.gate_from, hooks=[record])
    total = sum(step_seconds)
    yield "a step", f"{statistics.median(step_seconds) * 1e3:.1f} ms"
    yield "recording a step", f"{statistics.median(recording.seconds) * 1e6:.0f} us"
    yield f"taking the points of {CHECKPOINT_STEPS} steps", f"{statistics.median(taking.seconds) * 1e3:.2f} ms"
    parts = Clock()
    output = engine.evaluate(micro.images)
    errors = worker.reconstruction_error(output)
    for _ in range(steps):
        parts(worker._curves, output, errors, errors, micro.num_objects, 0)
    yield "a step's part of the curves", f"{statistics.median(parts.seconds) * 1e6:.0f} us"
    hooks = (parts, recording, taking)
    yield (
        "**logging, of the steps' processor time**",
        f"**{sum(sum(clock.cpu) for clock in hooks) / sum(step_cpu):.2%}**",
    )
    yield "the same by the clock", f"{sum(sum(clock.seconds) for clock in hooks) / total:.2%}"

    with tempfile.TemporaryDirectory() as home:
        os.environ["SLOTFORGE_HOME"] = home
        folder = RunFolder(Path(home) / "runs" / recipe.name)
        folder.claim(recipe)
        tracker = Tracker(recipe, folder)
        sending = Clock()
        for start in range(0, len(points), len(points) // 4 or 1):
            sending(tracker.send, points[start : start + (len(points) // 4 or 1)])
        yield "points sent", f"{len(points) / sum(sending.seconds):.0f} a second"
        yield "sending, processor time of the driver, of the steps' time", f"{sum(sending.cpu) / total:.2%}"

        scenes, taken, drawing = FirstScenes(), Clock(), Clock()
        output = engine.evaluate(micro.images, trace=True)
        taken(scenes.look, micro, output)
        glimpse = scenes.glimpse(counted(recipe, len(micro.weight)))
        assert isinstance(glimpse, Glimpse)
        content = taken(glimpse.to_bytes)
        gallery = Gallery(Path(home) / "pictures")
        gallery.finish()  # or it would rest between pictures
        for number in range(DRAWN):
            gallery.add(number, content)
            drawing(gallery.deliver, tracker)
        yield "pictures of an evaluation, on rank 0", f"{sum(taken.seconds) * 1e3:.1f} ms, {len(content) / 1e6:.2f} MB"
        pictures = f"{min(drawing.cpu) * 1e3:.0f} ms (the first time {drawing.cpu[0] * 1e3:.0f} ms)"
        yield "pictures of an evaluation, processor time of the driver", pictures


def counted(recipe: Recipe, images: int) -> SlotCounts:
    """Kept slots against objects, for a heat map."""
    kept = torch.arange(images) % (recipe.model.num_slots + 1)
    return SlotCounts(count_confusion(kept, kept.flip(0), recipe.model.num_slots, recipe.model.num_slots), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=200, help=f"{CHECKPOINT_STEPS} at least")
    parser.add_argument("--images", type=int, default=32, help="of a step, on one rank")
    parser.add_argument("--write", action="store_true", help="into BENCHMARKS.md")
    given = parser.parse_args()
    if given.steps < CHECKPOINT_STEPS:
        parser.error(f"--steps: {given.steps} is less than {CHECKPOINT_STEPS}, after which points are taken")
    torch.set_num_threads(1)
    around = machine()
    rows = list(measured(load_recipe(given.recipe), given.steps, given.images))
    text = "\n".join(
        [
            f"{given.recipe}, {given.steps} steps of {given.images} images, points every {CHECKPOINT_STEPS} steps to a "
            f"checkpoint, one thread; {around}; "
            f"{versions('torch', 'mlflow')}.",
            "",
            "| what | |",
            "|---|---|",
            *(f"| {what} | {value} |" for what, value in rows),
        ]
    )
    print(text)
    if given.write:
        write(
            "tracking", f"## What logging costs\n\n    python -m benchmarks.tracking --recipe {given.recipe}\n\n{text}"
        )


if __name__ == "__main__":
    main()
