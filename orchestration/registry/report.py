"""What slotforge evaluate tells of a model: every metric, for several numbers of slots, with what it is sure of."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from orchestration.registry.held_out import HeldOut
from orchestration.registry.record import figure, shown
from orchestration.registry.trained import Trained
from orchestration.scores import CONFIDENCE, RESAMPLES, Estimate
from orchestration.wording import counted

SEEDS = (0, 1, 2)
"""Of the initial slots' fixed noise; a registered model has the first."""


@dataclass(frozen=True)
class Figure:
    """A metric at one number of slots.

    Fields:
        estimate: with the noise that a registered model has.
        seeds: values by seed of the initial slots.
    """

    estimate: Estimate
    seeds: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.seeds)


@dataclass(frozen=True)
class Report:
    """A model on a held-out set.

    Fields:
        label: of the model.
        held_out: the set's digest.
        images: how many.
        figures: by number of slots, then by metric.
    """

    label: str
    held_out: str
    images: int
    figures: Mapping[int, Mapping[str, Figure]]

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.label,
            "held_out": self.held_out,
            "images": self.images,
            "interval": {
                "confidence": CONFIDENCE,
                "method": "percentile bootstrap over images",
                "resamples": RESAMPLES,
            },
            "seeds": list(SEEDS),
            "slots": {
                str(slots): {
                    name: {**figure(f.estimate), "seeds": list(f.seeds), "spread": f.spread}
                    for name, f in figures.items()
                }
                for slots, figures in self.figures.items()
            },
        }

    def table(self) -> Table:
        title = f"{self.label} on {counted(self.images, 'held-out image')} ({self.held_out[:12]})"
        caption = f"{CONFIDENCE:.0%} percentile bootstrap over images; ±: deviation over {len(SEEDS)} seeds"
        table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
        table.add_column("metric")
        for slots in self.figures:
            table.add_column(counted(slots, "slot"), justify="right")
        for name in next(iter(self.figures.values())):
            row = [figures[name] for figures in self.figures.values()]
            table.add_row(name, *(escape(f"{shown(found.estimate)} ± {found.spread:.4f}") for found in row))
        return table


def evaluated(label: str, trained: Trained, held_out: HeldOut, slots: Sequence[int], progress: Progress) -> Report:
    """Evaluates a model at each number of slots, with each seed, in one reading of the set.

    Raises:
        ValueError: the model has no other number of slots.
        DataError, NotFiniteError: as HeldOut.score.
    """
    finders = {(k, seed): trained.finder(k, seed) for k in dict.fromkeys(slots) for seed in SEEDS}
    scores = held_out.score(finders, progress, f"evaluating {label}")
    estimates = {key: found.estimates for key, found in scores.items()}
    return Report(
        label=label,
        held_out=held_out.digest,
        images=next(iter(scores.values())).images,
        figures={
            k: {
                name: Figure(estimate, tuple(estimates[k, seed][name].value for seed in SEEDS))
                for name, estimate in estimates[k, SEEDS[0]].items()
            }
            for k in dict.fromkeys(slots)
        },
    )
