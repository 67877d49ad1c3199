"""What a run ends with: evaluation, registration, a picture and a table."""

import os
import shlex
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from orchestration.assembly import Data, evaluation_batches
from orchestration.evaluate import Evaluation
from orchestration.figures import confusion_figure, curves_figure
from orchestration.pictures import scene_sheet
from orchestration.recipe import Recipe
from orchestration.registry.held_out import HeldOut
from orchestration.registry.loading import load
from orchestration.registry.promote import Decision
from orchestration.registry.register import register
from orchestration.registry.trained import Trained
from orchestration.runs.checkpoints import newest_valid
from orchestration.runs.folder import RunFolder
from orchestration.terminal import new_progress
from orchestration.tracking import Tracker
from orchestration.tracking.description import describe
from orchestration.wording import counted

PICTURED = 6  # scenes in the picture
PLOTTED = ("loss/reconstruction", "eval/fg_ari", "slots/kept_mean", "slots/count_error")


def report(recipe: Recipe, folder: RunFolder, tracker: Tracker, data: Data, console: Console) -> None:
    """Evaluates the newest checkpoint, registers it, loads it back, and shows what it sees."""
    checkpoint = newest_valid(folder.checkpoints)
    assert checkpoint is not None  # training has just finished, or was found finished
    trained, held_out = Trained.of(recipe, checkpoint.weights()), HeldOut(recipe, data.eval)
    images = _first_images(recipe, data)
    with new_progress(console) as progress:
        scores = held_out.score({"it": trained.finder()}, progress, "evaluating on held-out scenes")["it"]
        registered = register(recipe, tracker, trained, scores, held_out, images[:2], progress)
        packaged = load(registered.uri, tracker.uri)
    evaluation = scores.evaluation()
    tracker.summarise({f"final/{name}": value for name, value in evaluation.metrics().items()}, checkpoint.steps)

    pictures = folder.path / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    scene_sheet(images, packaged.run(images)).save(pictures / "scenes.png")
    if evaluation.counts is not None:
        confusion_figure(evaluation.counts).savefig(pictures / "counts.png")
    curves = {name: tracker.points(name) for name in PLOTTED}
    curves_figure({name: points for name, points in curves.items() if points}).savefig(pictures / "curves.png")
    for path in sorted(pictures.glob("*.png")):
        with PIL.Image.open(path) as picture:
            tracker.show(path.stem, picture)

    outcome = _outcome(recipe, evaluation, tracker, registered)
    describe(tracker, recipe, outcome)
    table = Table(
        title=f"{recipe.name} after {counted(recipe.train.steps, 'step')}", show_header=False, title_justify="left"
    )
    mine = {"MLflow run": f"{tracker.run_name} ({tracker.run_id})", "pictures": str(pictures)}
    for row in (outcome | mine).items():
        table.add_row(*row)
    console.print(table)
    _print_commands(console, tracker, registered)


def _first_images(recipe: Recipe, data: Data) -> NDArray[np.uint8]:
    stream, _ = evaluation_batches(recipe, data.eval)
    with stream:
        images = torch.cat([micro.images[micro.weight > 0] for micro in stream.step(0)])[:PICTURED]
    return ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()  # [N, H, W, 3]


def _outcome(recipe: Recipe, evaluation: Evaluation, tracker: Tracker, registered: Decision) -> dict[str, str]:
    rows = {}
    if evaluation.fg_ari is not None:
        rows[f"FG-ARI on {evaluation.images} held-out scenes"] = f"{evaluation.fg_ari:.3f}"
        overlaps = (evaluation.means[name] for name in ("mbo", "miou", "corloc") if name in evaluation.means)
        rows["mBO, mIoU, CorLoc"] = ", ".join(f"{overlap:.3f}" for overlap in overlaps)
    else:
        rows[f"reconstruction of {evaluation.images} held-out images"] = f"{evaluation.reconstruction:.3g}"
    counts = evaluation.counts
    if counts is not None:
        rows["objects against kept slots"] = (
            f"mean error {counts.mean_absolute_error:.2f} (best constant {counts.best_constant_error:.2f}), "
            f"correlation {counts.correlation:.2f}, exactly right {counts.accuracy:.0%}"
        )
        rows["kept slots by objects"] = _counts_line(evaluation)
    seconds, waited = ([v for _, v in tracker.points(name)] for name in ("time/step", "time/data_wait"))
    if seconds:
        rows["training speed"] = f"{recipe.train.batch_size / float(np.median(seconds)):.0f} images/s"
        rows["waiting for data"] = f"{sum(waited) / sum(seconds):.1%} of the time"
    gate = "champion" if registered.champion else f"not champion: {registered.reason}"
    return {**rows, "registered": f"{registered.name} version {registered.version}, {gate}"}


def _counts_line(evaluation: Evaluation) -> str:
    assert evaluation.counts is not None
    confusion = evaluation.counts.confusion
    kept = torch.arange(confusion.shape[0], dtype=torch.float64)
    means = (confusion * kept[:, None]).sum(dim=0) / confusion.sum(dim=0)
    return ", ".join(f"{n}: {mean:.2f}" for n, mean in enumerate(means.tolist()) if mean == mean)


def _print_commands(console: Console, tracker: Tracker, registered: Decision) -> None:
    uri = shlex.quote(tracker.uri)
    programs = os.path.relpath(Path(sys.executable).parent)
    console.print("\nSee the run's page:", style="bold")
    if not tracker.uri.startswith("http"):
        console.print(f"  {programs}/mlflow ui --backend-store-uri {uri}", soft_wrap=True, highlight=False)
    console.print(f"  {tracker.page}", soft_wrap=True, highlight=False)
    console.print("Find the objects in an image of your own:", style="bold")
    console.print(
        f"  {programs}/slotforge predict IMAGE.png --model {registered.uri} --tracking-uri {uri}",
        soft_wrap=True,
        highlight=False,
    )
