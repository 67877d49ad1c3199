"""How well an epoch is shuffled, beside webdataset's own buffer in equal memory; BENCHMARKS.md has larger sets."""

import numpy as np
import pytest

from benchmarks.page import write
from benchmarks.shuffle import buffered, drift, epoch, shards_in_a_batch, variance
from pipelines.plan import Plan, index_from_counts

BATCH = 32


def plan(shards: int, each: int, **options: int) -> Plan:
    return Plan(index_from_counts([each] * shards), **({"batch_size": BATCH, "seed": 5} | options))


@pytest.mark.parametrize(("shards", "each"), [(200, 50), (1000, 12), (320, 40)])
def test_an_epoch_is_shuffled_better_than_behind_a_buffer_of_equal_memory(shards: int, each: int) -> None:
    """With the defaults, in sets that are large beside the memory: whoever holds most of a set shuffles it all."""
    held = 8 * each  # 8 lanes, one shard's worth each
    for number in range(3):
        ours, theirs = epoch(plan(shards, each), number), buffered(shards, each, held, number)
        assert np.array_equal(np.sort(ours), np.sort(theirs))
        assert drift(ours) < 0.45 < 0.98 < drift(theirs)
        assert shards_in_a_batch(ours, BATCH) > shards_in_a_batch(theirs, BATCH)
        assert variance(ours, BATCH) < 0.8 * variance(theirs, BATCH)


@pytest.mark.parametrize(
    "options",
    [
        {"parts": 1},  # whole shards
        {"parts": 1, "window": 4},
        {"lanes": 1, "parts": 1},
    ],
)
def test_shards_that_are_read_in_one_go_drift(options: dict[str, int]) -> None:
    """So what is asserted above can fail, and does for less than the default."""
    assert drift(epoch(plan(400, 10, **options))) > 0.98


def test_drift_is_one_without_a_shuffle_and_none_in_a_free_one() -> None:
    stored = np.repeat(np.arange(100), 40)
    assert drift(stored) == pytest.approx(1, abs=1e-4)
    assert drift(stored[::-1]) == pytest.approx(1, abs=1e-4)  # whichever comes first
    assert abs(drift(np.random.default_rng(0).permutation(stored))) < 0.05


@pytest.mark.parametrize("kind", ["stored", "plan", "free"])
def test_variance_is_that_of_batch_means(kind: str) -> None:
    """Of random quantities, measured, over that of means of free draws from the same samples."""
    stored = np.repeat(np.arange(60), 64)
    random = np.random.default_rng(1)
    shards = {"stored": stored, "plan": epoch(plan(60, 64)), "free": random.permutation(stored)}[kind]
    quantity = random.standard_normal((2000, 60))
    quantity = (quantity - quantity.mean(axis=1, keepdims=True)) / quantity.std(axis=1, keepdims=True)
    means = quantity[:, shards].reshape(2000, -1, BATCH).mean(axis=2)
    assert (means**2).mean() * BATCH == pytest.approx(variance(shards, BATCH), rel=0.03)
    assert variance(stored, BATCH) == pytest.approx(BATCH)


def test_a_section_of_the_page_is_written_in_its_place(tmp_path) -> None:  # type: ignore[no-untyped-def]
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- a -->\nold\n<!-- /a -->\n\nafter\n")
    write("a", "new", page)
    assert page.read_text() == "# Page\n\n<!-- a -->\nnew\n<!-- /a -->\n\nafter\n"
    write("b", "more", page)
    assert page.read_text().endswith("after\n\n<!-- b -->\nmore\n<!-- /b -->\n")
