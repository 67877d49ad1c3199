"""What a user sees while something runs: progress bars, and errors."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def new_progress(console: Console) -> Progress:
    """The progress bars of everything that takes long."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=False)


def complain(message: str) -> None:
    """An error, as it stands: brackets in it are not Rich's markup."""
    Console(stderr=True, soft_wrap=True).print(f"slotforge: {message}", style="red", highlight=False, markup=False)
