"""What the ranks of a run say they have read: a file for each rank of each attempt."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from orchestration.assembly import training_order
from orchestration.recipe import load_recipe


@dataclass(frozen=True)
class Attempt:
    """The ranks between one start and the next.

    Fields:
        began: seconds since the epoch.
        start: steps done before it.
        samples: for each step, counted from 0, (place, sample) of all ranks.
    """

    began: float
    start: int
    samples: dict[int, list[tuple[int, int]]]

    @property
    def last(self) -> int:
        """The last step that it did; one less than its start if none."""
        return max(self.samples, default=self.start - 1)


def attempts(folder: Path) -> list[Attempt]:
    """All attempts, oldest first."""
    found: dict[tuple[int, str], list[Path]] = defaultdict(list)
    for path in folder.glob("*-rank-*.txt"):
        start, token, _ = path.name.split("-", 2)
        found[int(start), token].append(path)
    made = []
    for (start, _), paths in found.items():
        samples: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for path in paths:
            whole, _, _ = path.read_text().rpartition("\n")  # a kill may cut the last line
            for line in whole.splitlines():
                step, _, place, sample, _ = line.split()
                samples[int(step)].append((int(place), int(sample)))
        made.append(Attempt(min(path.stat().st_ctime for path in paths), start, samples))
    return sorted(made, key=lambda attempt: attempt.start)


def newest_step(folder: Path) -> int:
    """Steps begun so far, by any attempt; looks at the ends of the files alone."""
    steps = [0]
    for path in folder.glob("*-rank-*.txt"):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 200))
            lines = file.read().split(b"\n")[1:-1]  # whole ones
        steps += [int(line.split()[0]) + 1 for line in lines[-1:]]
    return max(steps)


def count(folder: Path) -> int:
    """Attempts whose first step has begun."""
    return len({path.name.split("-")[1] for path in folder.glob("*-rank-*.txt")})


def check(folder: Path, recipe: str, changes: list[str], train: Path, until: int | None = None) -> None:
    """Every step saw the plan's batch, each sample once, whoever read it; steps that were done again saw it again.

    Args:
        recipe, changes, train: what ran, and its shards.
        until: steps that are to be there; None: all of the recipe's.
    """
    loaded = load_recipe(recipe, changes)
    order = training_order(loaded, train)
    whole: set[int] = set()
    for attempt in attempts(folder):
        for step, samples in attempt.samples.items():
            expected = list(enumerate(order.batch(step).tolist()))
            if step < attempt.last:  # a kill may cut the last one short
                assert sorted(samples) == expected, f"step {step} of the attempt from {attempt.start}"
                whole.add(step)
            else:
                assert len(set(samples)) == len(samples) and set(samples) <= set(expected), step
                whole |= {step} if len(samples) == len(expected) else set()
    wanted = set(range(loaded.train.steps if until is None else until))
    assert wanted <= whole, sorted(wanted - whole)[:5]
