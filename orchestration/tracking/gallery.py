"""Pictures of a run, drawn by the driver from what rank 0 has seen, on their way to MLflow."""

import io
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
from matplotlib.figure import Figure

from orchestration.files import write_bytes
from orchestration.glimpse import Glimpse
from orchestration.pictures import attention_figure, confusion_figure, scene_figure
from orchestration.tracking.tracker import Tracker
from slot_models import SlotCounts

ENDING = ".glimpse"


class Gallery:
    """Draws glimpses and sends the pictures. What has not been sent waits in a folder, whoever drives the run.

    Args:
        folder: on this machine.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, step: int, glimpse: bytes) -> None:
        """Raises: OSError: the folder cannot be written."""
        write_bytes(self._folder / f"{step:09d}{ENDING}", glimpse)

    def deliver(self, tracker: Tracker) -> None:
        for path in sorted(self._folder.glob(f"*{ENDING}")):
            step, glimpse = int(path.stem), Glimpse.from_bytes(path.read_bytes())
            for name, figure in _figures(glimpse):
                tracker.picture(name, step, drawn(figure))
            if glimpse.counts is not None:
                tracker.client.log_dict(tracker.run_id, _table(glimpse.counts), f"counts/{path.stem}.json")
            path.unlink()


def drawn(figure: Figure) -> PIL.Image.Image:
    """A figure as pixels."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return PIL.Image.open(file)


def _figures(glimpse: Glimpse) -> Iterator[tuple[str, Figure]]:
    yield "scenes", scene_figure(glimpse.images, glimpse.output)
    if glimpse.output.attention is not None:
        yield "attention", attention_figure(glimpse.images, glimpse.output.attention)
    if glimpse.counts is not None:
        yield "counts", confusion_figure(glimpse.counts)


def _table(counts: SlotCounts) -> dict[str, object]:
    """Images by kept slots and objects, as MLflow shows tables."""
    rows = [
        [kept, objects, int(images)]
        for kept, row in enumerate(counts.confusion.tolist())
        for objects, images in enumerate(row)
        if images
    ]
    return {"columns": ["kept slots", "objects", "images"], "data": rows}
