"""Pictures of a run, drawn by the driver from what rank 0 has seen, on their way to MLflow."""

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import PIL.Image
from matplotlib.figure import Figure

from orchestration.figures import confusion_figure
from orchestration.files import write_bytes
from orchestration.glimpse import Glimpse
from orchestration.pictures import attention_sheet, scene_sheet
from orchestration.tracking.tracker import Tracker
from slot_models import SlotCounts

ENDING = ".glimpse"
SHARE = 0.02  # of the time that drawing may take while a run trains: on a small machine it takes the workers' cores


class Gallery:
    """Draws glimpses and sends the pictures. What has not been sent waits in a folder, whoever drives the run.

    None is left out: where they come faster than SHARE allows, the newest is drawn first, and the others while there is
    time, or at the end.

    Args:
        folder: on this machine.
        now, cpu: seconds of a clock that only goes forward, and of this thread's processor time.
    """

    def __init__(
        self,
        folder: Path,
        now: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.thread_time,
    ) -> None:
        self._folder, self._now, self._cpu = folder, now, cpu
        self._rests_until = now()
        self._over = False

    def add(self, step: int, glimpse: bytes) -> None:
        """Raises: OSError: the folder cannot be written."""
        write_bytes(self._folder / f"{step:09d}{ENDING}", glimpse)

    def finish(self) -> None:
        """Nothing trains any more: from now on all are drawn at once."""
        self._over = True

    def deliver(self, tracker: Tracker) -> None:
        for path in sorted(self._folder.glob(f"*{ENDING}"), reverse=True):
            if not self._over and self._now() < self._rests_until:
                return
            began = self._cpu()
            step, glimpse = int(path.stem), Glimpse.from_bytes(path.read_bytes())
            for name, picture in _pictures(glimpse):
                tracker.picture(name, step, picture)
            if glimpse.counts is not None:
                tracker.client.log_dict(tracker.run_id, _table(glimpse.counts), f"counts/{path.stem}.json")
            path.unlink()
            self._rests_until = self._now() + (self._cpu() - began) / SHARE


def _pictures(glimpse: Glimpse) -> Iterator[tuple[str, PIL.Image.Image]]:
    yield "scenes", scene_sheet(glimpse.images, glimpse.output)
    if glimpse.output.attention is not None:
        yield "attention", attention_sheet(glimpse.images, glimpse.output.attention)
    if glimpse.counts is not None:
        yield "counts", _drawn(confusion_figure(glimpse.counts))


def _drawn(figure: Figure) -> PIL.Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png", pil_kwargs={"compress_level": 1})
    return PIL.Image.open(file).convert("RGB")


def _table(counts: SlotCounts) -> dict[str, object]:
    """Images by kept slots and objects, as MLflow shows tables."""
    rows = [
        [kept, objects, int(images)]
        for kept, row in enumerate(counts.confusion.tolist())
        for objects, images in enumerate(row)
        if images
    ]
    return {"columns": ["kept slots", "objects", "images"], "data": rows}
