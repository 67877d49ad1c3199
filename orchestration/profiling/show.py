"""What the user wishes to see of a run's steps: a table, and a file with a trace."""

import gzip
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from orchestration.profiling.profile import StepProfile
from orchestration.recipe import RecipeError
from orchestration.wording import counted


@dataclass(frozen=True)
class Wish:
    """What is wanted of a run's steps: a table at its end, and a file with a trace for Perfetto of a few of them.

    Raises:
        RecipeError: the file cannot be written.
    """

    trace: Path | None = None

    def __post_init__(self) -> None:
        if self.trace is not None and (self.trace.is_dir() or not self.trace.absolute().parent.is_dir()):
            raise RecipeError(f"--trace: {self.trace} is no file in a folder that is there; name one, e.g. trace.json")


def profile_table(profile: StepProfile) -> Table:
    """Where a step's time went."""
    table = Table(
        title=f"Where a step's time went: rank 0, {counted(profile.steps, 'step')}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("part")
    table.add_column("ms a step", justify="right")
    table.add_column("share", justify="right")
    whole = profile.step_seconds
    for name, seconds in profile.seconds.items():
        table.add_row(name, f"{1e3 * seconds:.3f}", f"{seconds / whole:.1%}")
    table.add_row("all", f"{1e3 * whole:.3f}", f"{profile.images / profile.steps / whole:.1f} images/s", style="bold")
    calls, sent = profile.traffic.calls / profile.steps, profile.traffic.sent / profile.steps
    table.add_row("sent by a rank", f"{sent / 1e6:.3f} MB", f"{calls:.1f} collectives")
    return table


def write_trace(content: bytes, path: Path) -> None:
    """Writes a trace, compressed if the file's name ends in .gz; https://ui.perfetto.dev opens either."""
    path.write_bytes(content if path.suffix == ".gz" else gzip.decompress(content))
