"""A job's log on this terminal: its lines as they are, its progress as a bar again."""

from rich.progress import Progress, TaskID

from orchestration.terminal import read_progress


class LogView:
    """Shows pieces of a log, cut anywhere.

    Args:
        progress: a bar for what the job tells of its progress; where nobody can draw one, its lines are shown.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar: TaskID | None = None
        self._rest = ""

    def feed(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line.rstrip("\r"))

    def close(self) -> None:
        """Shows a last line without an end."""
        if self._rest:
            self._line(self._rest)
            self._rest = ""

    def tell(self, sentence: str) -> None:
        """A word of ours between the lines."""
        self._progress.console.print(f"slotforge: {sentence}", style="yellow", highlight=False, markup=False)

    def _line(self, line: str) -> None:
        found = read_progress(line) if self._progress.console.is_terminal else None
        if found is None:
            self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
            return
        done, total, text = found
        if self._bar is None:
            self._bar = self._progress.add_task(text, total=total)
        self._progress.update(self._bar, completed=done, total=total, description=text)
