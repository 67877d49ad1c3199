"""How well an epoch is shuffled, beside WebDataset's buffer of equal memory: python -m benchmarks.shuffle [--write]

Three things that a user can notice, of the shard that each sample of an epoch comes from:

    drift        Spearman's rank correlation of position in the epoch and the order in which shards first come: 1 is
                 shard after shard, near 0 a free shuffle, where a place tells nothing of which shards it shows
    shards       different shards in a batch
    variance     how much the batches' means of something that belongs to shards (their light, their class) vary,
                 in units of what they vary when batches are drawn freely: 1 is a free shuffle
"""

import argparse
import random

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.page import write
from pipelines.plan import Plan, index_from_counts

SHARDS, PER_SHARD, BATCH = 400, 500, 64


def drift(shards: NDArray[np.int64]) -> float:
    """Rank correlation of position and the order in which shards first come, in [-1, 1]; `shards` int64 [N]."""
    _, first, inverse = np.unique(shards, return_index=True, return_inverse=True)
    return float(spearmanr(np.arange(len(shards)), first[inverse]).statistic)


def shards_in_a_batch(shards: NDArray[np.int64], batch: int) -> float:
    """Different shards in a batch, the mean over full batches."""
    batches = shards[: len(shards) // batch * batch].reshape(-1, batch)
    return float(np.mean([len(np.unique(one)) for one in batches]))


def variance(shards: NDArray[np.int64], batch: int) -> float:
    """Variance of the batches' means of a quantity of shards, in units of that of free draws.

    Of random quantities only how often two samples of a batch are of one shard counts: what is returned is the
    expectation over all of them, 1 + (batch - 1) * (excess of such pairs over free draws).
    """
    batches = shards[: len(shards) // batch * batch].reshape(-1, batch)
    counts = [np.unique(one, return_counts=True)[1] for one in batches]
    pairs = np.mean([(count * (count - 1)).sum() for count in counts]) / (batch * (batch - 1))
    share = np.unique(shards, return_counts=True)[1] / len(shards)
    free = (share**2).sum()
    return float(1 + (batch - 1) * (pairs - free) / (1 - free))


def epoch(plan: Plan, number: int = 0) -> NDArray[np.int64]:
    """The shard of each sample of an epoch of a plan, int64 [N]."""
    first = number * plan.steps_per_epoch
    samples = np.concatenate([plan.batch(step) for step in range(first, first + plan.steps_per_epoch)])
    return np.searchsorted(plan.index.offsets, samples, side="right") - 1


def buffered(shards: int, each: int, held: int, seed: int = 0) -> NDArray[np.int64]:
    """The same behind webdataset's own shuffle of shards and its buffer of `held` samples, int64 [N]."""
    rng = random.Random(seed)  # noqa: S311 webdataset's own
    samples = (shard for shard in rng.sample(range(shards), shards) for _ in range(each))
    return np.fromiter(wds.shuffle(held, initial=held, rng=rng)(samples), dtype=np.int64)


def table() -> str:
    """Every way to shuffle, in Markdown."""
    index = index_from_counts([PER_SHARD] * SHARDS)

    def plan(lanes: int, window: int, parts: int) -> NDArray[np.int64]:
        return epoch(Plan(index, batch_size=BATCH, seed=1, lanes=lanes, window=window, parts=parts))

    free = np.random.default_rng(0).permutation(SHARDS * PER_SHARD) // PER_SHARD
    ways = {
        "a free shuffle": (SHARDS, free),
        "**8 lanes, window 1, shards in 4 parts: the default**": (8, plan(8, 1, 4)),
        "webdataset's buffer": (8, buffered(SHARDS, PER_SHARD, 8 * PER_SHARD)),
        "8 lanes, window 4, shards in 4 parts": (32, plan(8, 4, 4)),
        "8 lanes, window 4, whole shards": (32, plan(8, 4, 1)),
        "webdataset's buffer, larger": (32, buffered(SHARDS, PER_SHARD, 32 * PER_SHARD)),
        "1 lane, window 1, whole shards": (1, plan(1, 1, 1)),
        "no shuffle": (0, np.arange(SHARDS * PER_SHARD) // PER_SHARD),
    }
    lines = ["| | shards in memory | drift | shards in a batch | variance |", "|---|---|---|---|---|"]
    for name, (held, shards) in ways.items():
        lines.append(
            f"| {name} | {held} | {drift(shards):.3f} | {shards_in_a_batch(shards, BATCH):.1f} | "
            f"{variance(shards, BATCH):.2f} |"
        )
    return "\n".join(lines)


NOTES = f"""\
{SHARDS} shards of {PER_SHARD} samples, batches of {BATCH}, one epoch. Drift is the rank correlation of a sample's
position in the epoch and the order in which its shard first comes: 1 is shard after shard. A reader that takes each
shard in one go drifts, however it shuffles what it holds: whole shards in our windows do no better than webdataset's
buffer. Parts of shards at times of their own do, and show as many shards in a batch in a quarter of the memory.
Variance is that of a batch's mean of something that belongs to shards, 1 for batches drawn freely."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into BENCHMARKS.md")
    options = parser.parse_args()
    made = table()
    print(made)
    if options.write:
        write(
            "shuffle",
            "\n\n".join(["## How well an epoch is shuffled", "    python -m benchmarks.shuffle", NOTES, made]),
        )


if __name__ == "__main__":
    main()
