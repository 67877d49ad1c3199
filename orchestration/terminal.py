"""What a user sees while something runs: progress bars, lines where no bar can be drawn, and errors."""

import re
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
DRAWN = 4  # times a second: each takes some of a core that may have other work

_LINE = re.compile(r"\[(?P<done>\d+)/(?P<total>\d+|\?)\] (?P<text>.*)")


def new_progress(console: Console) -> Progress:
    """The progress bars of everything that takes long; in a log file, a line of each now and then."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if console.is_terminal:
        return Progress(*columns, console=console, refresh_per_second=DRAWN)
    return _Lines(*columns, console=console, auto_refresh=False)


def progress_line(done: float, total: float | None, text: str) -> str:
    """A bar as a line, which `read_progress` understands."""
    return f"[{done:.0f}/{'?' if total is None else f'{total:.0f}'}] {text}"


def read_progress(line: str) -> tuple[int, int | None, str] | None:
    """(done, total, text) of such a line; None for any other."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    return int(found["done"]), None if found["total"] == "?" else int(found["total"]), found["text"]


def tell(progress: Progress, text: str, style: str) -> None:
    """A line above the bars, as it stands: brackets in it are not Rich's markup."""
    progress.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def complain(message: str) -> None:
    """An error, as it stands: brackets in it are not Rich's markup."""
    Console(stderr=True, soft_wrap=True).print(f"slotforge: {message}", style="red", highlight=False, markup=False)


class _Lines(Progress):
    """Bars for a file: nobody can redraw them there."""

    _told = float("-inf")

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._tell(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        if (now := time.monotonic()) - self._told < LINE_SECONDS:
            return
        self._told = now
        task = self._tasks[task_id]
        line = progress_line(task.completed, task.total, task.description)
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
