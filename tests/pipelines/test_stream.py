"""A stream hands out the plan: every sample once, with its own noise, whatever the world and whatever is broken."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.errors import DataError, TransientError
from pipelines.index import Index, index_from_counts
from pipelines.noise import Purpose, gumbel, normal
from pipelines.plan import Piece, Plan
from pipelines.reader import Reader
from pipelines.samples import encode
from pipelines.shards import read_index
from pipelines.sources import Sources
from pipelines.stream import MicroBatch, Stream
from pipelines.transforms import to_model, to_pixels

MakeSet = Callable[..., Index]
COUNTS = [7, 1, 12, 3, 9, 5]  # 37 samples
BROKEN = {"image.png": b"not a picture"}


@pytest.fixture
def folder(tmp_path: Path, make_set: MakeSet) -> Path:
    make_set(tmp_path, COUNTS)
    return tmp_path


def plan_of(folder: Path, batch_size: int = 8, lanes: int = 4, window: int = 2) -> Plan:
    return Plan(read_index(folder), batch_size=batch_size, seed=3, lanes=lanes, window=window)


def open_stream(plan: Plan, folder: Path, rank: int = 0, world: int = 1, **changes) -> Stream:  # type: ignore[no-untyped-def]
    noise = {"slots": (2, 3), "gate": (2,)}
    return Stream(
        plan, folder, **({"rank": rank, "world": world, "micro_batch": 3, "seed": 9, "noise": noise} | changes)
    )


def real(micro_batches: list[MicroBatch]) -> Iterator[tuple[MicroBatch, int]]:
    """(micro batch, row) of every sample that is not padding."""
    for micro in micro_batches:
        for row in np.flatnonzero(micro.weight.numpy()):
            yield micro, int(row)


def shown(micro: MicroBatch, row: int) -> int:
    """The number that is drawn into the picture."""
    pixels = to_pixels(micro.images)[row]
    assert (pixels == pixels[0, 0]).all()
    return int(pixels[0, 0, 0]) + 256 * int(pixels[0, 0, 1])


def handed_out(plan: Plan, folder: Path, steps: range, world: int, **changes) -> list[list[int]]:  # type: ignore[no-untyped-def]
    """The samples shown in each step, over all ranks in order of place."""
    streams = [open_stream(plan, folder, rank, world, **changes) for rank in range(world)]
    try:
        return [[shown(micro, row) for stream in streams for micro, row in real(stream.step(step))] for step in steps]
    finally:
        for stream in streams:
            stream.close()


def read_epochs(stream: Stream, plan: Plan, epochs: int = 1) -> None:
    for step in range(epochs * plan.steps_per_epoch):
        stream.step(step)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_seek_reads_the_open_windows_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    plan = plan_of(folder, window=1)
    read: list[Piece] = []
    piece_of = Reader._piece
    monkeypatch.setattr(Reader, "_piece", lambda reader, piece: read.append(piece) or piece_of(reader, piece))
    for step in range(2 * plan.steps_per_epoch):
        if plan.size(step) < plan.batch_size:
            continue
        for rank in range(world):
            read.clear()
            with open_stream(plan, folder, rank, world) as stream:
                stream._begin(step)
            spans = plan.spans(step, *plan.bounds(step, rank, world))
            windows = dict.fromkeys(span.window for span in spans)
            assert read == [piece for window in windows for piece in plan.pieces(window)]  # each once
            # A second window in a lane only where the first one ends within the step.
            lanes = Counter(window.lane for window in windows)
            ended = [a.window.lane for a, b in pairwise(spans) if a.window.lane == b.window.lane]
            assert len(lanes) <= plan.open_lanes(world) and sum(lanes.values()) == len(lanes) + len(ended)
            for a, b in pairwise(spans):
                if a.window.lane == b.window.lane:
                    assert a.first + a.count == len(plan.order(a.window)) and b.first == 0


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 11])
def test_pictures_come_in_the_order_of_the_plan(folder: Path, world: int) -> None:
    plan = plan_of(folder)
    steps = range(2 * plan.steps_per_epoch)
    assert handed_out(plan, folder, steps, world) == [plan.batch(step).tolist() for step in steps]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_size=st.integers(1, 20),
    lanes=st.integers(1, 8),
    window=st.integers(1, 4),
    world=st.integers(1, 5),
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=4),
)
def test_any_step_can_be_asked_for_next(
    folder: Path, batch_size: int, lanes: int, window: int, world: int, steps: list[int]
) -> None:
    plan = plan_of(folder, batch_size, lanes, window)
    streams = [open_stream(plan, folder, rank, world) for rank in range(world)]
    for step in steps:
        read = [shown(micro, row) for stream in streams for micro, row in real(stream.step(step))]
        assert read == plan.batch(step).tolist()
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("world", [1, 3, 9])
def test_every_rank_runs_as_many_micro_batches_of_one_shape(folder: Path, world: int) -> None:
    plan = plan_of(folder)
    for rank in range(world):
        with open_stream(plan, folder, rank, world, with_masks=True) as stream:
            for step in range(plan.steps_per_epoch):  # the last one is short
                micros = stream.step(step)
                assert len(micros) == stream.num_micro_batches
                m = stream.micro_batch
                for micro in micros:
                    assert micro.images.shape == (m, 3, 8, 6) and micro.images.dtype == torch.float32
                    assert micro.weight.shape == (m,) and micro.weight.dtype == torch.float32
                    assert micro.slot_noise is not None and micro.slot_noise.shape == (m, 2, 3)
                    assert micro.gate_noise is not None and micro.gate_noise.shape == (m, 2)
                    assert micro.masks is not None and micro.masks.shape == (m, 8, 6)
                    assert micro.masks.dtype == micro.ids.dtype == micro.places.dtype == torch.int64
                    # Padding repeats a sample of this very batch, so nothing foreign enters the graph.
                    assert set(micro.ids.tolist()) <= set(plan.batch(step).tolist())


@pytest.mark.parametrize("world", [1, 2, 5, 9])
def test_weights_count_each_sample_of_a_step_once(folder: Path, world: int) -> None:
    plan = plan_of(folder)
    streams = [open_stream(plan, folder, rank, world) for rank in range(world)]
    for step in range(plan.steps_per_epoch):
        micros = [micro for stream in streams for micro in stream.step(step)]
        weights = torch.cat([micro.weight for micro in micros])
        assert set(weights.tolist()) <= {0.0, 1.0} and weights.sum() == plan.size(step) == streams[0].batch_size(step)
        places = [int(micro.places[row]) for micro, row in real(micros)]
        assert places == list(range(plan.size(step)))
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("world", [1, 4])
def test_noise_and_facts_belong_to_the_sample(folder: Path, world: int) -> None:
    plan = plan_of(folder)
    step = plan.steps_per_epoch + 1
    rows = [row for count in COUNTS for row in range(count)]
    for rank in range(world):
        with open_stream(plan, folder, rank, world, with_masks=True) as stream:
            for micro in stream.step(step):
                assert micro.slot_noise is not None and micro.gate_noise is not None and micro.masks is not None
                places = micro.places.tolist()  # padding too has the noise of the place it repeats
                assert np.array_equal(micro.slot_noise, normal(9, Purpose.SLOTS, step, places, (2, 3)))
                assert np.array_equal(micro.gate_noise, gumbel(9, Purpose.GATE, step, places, (2,)))
                assert micro.ids.tolist() == plan.batch(step)[places].tolist()
                for i, number in enumerate(micro.ids.tolist()):
                    assert shown(micro, i) == number
                    assert micro.num_objects[i] == number % 5
                    assert (micro.masks[i] == rows[number] % 4).all()


def test_what_is_not_asked_for_is_none(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(tmp_path, [4], {number: {"json": None, "masks.png": None} for number in range(4)})
    with open_stream(plan_of(tmp_path, 4), tmp_path, noise={}) as stream:
        for micro in stream.step(0):
            assert micro.slot_noise is None and micro.gate_noise is None and micro.masks is None
            assert (micro.num_objects == -1).all()
            assert micro.to("cpu").masks is None and torch.equal(micro.to("cpu").ids, micro.ids)


def expected_with_bad(plan: Plan, step: int, bad: set[int]) -> list[int]:
    """DESIGN's rule, written once more: the next good one of the window's order, cyclic."""
    samples = []
    for span in plan.spans(step, 0, plan.size(step)):
        order = plan.order(span.window).tolist()
        for i in range(span.first, span.first + span.count):
            samples.append(next(number for number in order[i:] + order[:i] if number not in bad))
    return samples


@pytest.mark.parametrize(
    "fault",
    [
        {"image.png": b"not a picture"},
        {"image.png": None},
        {"image.png": encode("other", np.zeros((6, 8, 3), dtype=np.uint8))["image.png"]},  # not of the set's size
        {"image.png": None, "masks.png": None, "json": None, "other.txt": b"no member that is read"},
        {"masks.png": None},
        {"json": b"{"},
    ],
)
@pytest.mark.parametrize("world", [1, 2, 5])
def test_a_bad_sample_is_replaced_alike_in_every_world(
    tmp_path: Path, make_set: MakeSet, fault: dict[str, bytes | None], world: int
) -> None:
    bad = {2, 9, 10, 11, 30}
    make_set(tmp_path, COUNTS, dict.fromkeys(bad, fault))
    plan = plan_of(tmp_path)
    steps = range(2 * plan.steps_per_epoch)
    read = handed_out(plan, tmp_path, steps, world, with_masks=True)
    assert read == [expected_with_bad(plan, step, bad) for step in steps]
    # Seeking finds the same: what is bad does not depend on what was read before.
    late = range(plan.steps_per_epoch + 2, 2 * plan.steps_per_epoch)
    assert handed_out(plan, tmp_path, late, world, with_masks=True) == [read[step] for step in late]


@pytest.mark.parametrize("damage", ["missing", "flipped", "truncated"])
@pytest.mark.parametrize("world", [1, 3])
def test_a_bad_shard_is_replaced_alike_in_every_world(folder: Path, damage: str, world: int) -> None:
    plan = plan_of(folder)
    path = folder / "003.tar"
    if damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1  # far behind every sample: what counts is that the file is not the one that was indexed
        path.write_bytes(data[:-512] if damage == "truncated" else data)
    bad = set(range(20, 23))
    steps = range(2 * plan.steps_per_epoch)
    read = handed_out(plan, folder, steps, world)
    assert read == [expected_with_bad(plan, step, bad) for step in steps]


def test_bad_samples_are_counted_and_logged_once(
    tmp_path: Path, make_set: MakeSet, caplog: pytest.LogCaptureFixture
) -> None:
    make_set(tmp_path, COUNTS, {2: BROKEN, 9: {"image.png": None}})
    (tmp_path / "003.tar").unlink()
    plan = plan_of(tmp_path)
    with caplog.at_level(logging.WARNING), open_stream(plan, tmp_path) as stream:
        read_epochs(stream, plan, 3)
        assert set(stream.bad) == {2, 9, 20, 21, 22}
        assert "cannot be decoded" in stream.bad[2] and "not there" in stream.bad[21]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert any("000.tar" in line and "s0r2" in line for line in lines)
    assert any("002.tar" in line and "s2r1" in line for line in lines)
    assert any("003.tar" in line and "not there" in line for line in lines)


def test_too_many_bad_samples_stop_the_run_and_name_the_worst_shard(tmp_path: Path, make_set: MakeSet) -> None:
    bad = {1: BROKEN} | dict.fromkeys(range(8, 14), BROKEN)
    make_set(tmp_path, COUNTS, bad)
    plan = plan_of(tmp_path, lanes=1, window=6)
    with open_stream(plan, tmp_path, bad_limit=7) as stream:
        read_epochs(stream, plan)
    with open_stream(plan, tmp_path, bad_limit=6) as stream:
        with pytest.raises(DataError, match=r"7 of 37, .* limit of 6; most in 002\.tar \([56]\)"):
            read_epochs(stream, plan)
        with pytest.raises(DataError, match="limit of 6"):  # trying again does not get by
            stream.step(0)


def test_the_default_limit_is_ten_in_a_small_set(tmp_path: Path, make_set: MakeSet) -> None:
    for bad, stops in ((10, False), (11, True)):
        make_set(tmp_path, [37], dict.fromkeys(range(bad), BROKEN))
        plan = plan_of(tmp_path, lanes=1)
        with open_stream(plan, tmp_path) as stream:
            if stops:
                with pytest.raises(DataError, match="11 of 37, more than the limit of 10"):
                    read_epochs(stream, plan)
            else:
                read_epochs(stream, plan)
                assert len(stream.bad) == 10


def test_a_window_without_a_good_sample_stops_the_run(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(tmp_path, [4, 4])
    (tmp_path / "000.tar").unlink()
    plan = Plan(read_index(tmp_path), batch_size=1, seed=3, lanes=1, parts=1)
    with open_stream(plan, tmp_path) as stream, pytest.raises(DataError, match=r"no good sample in 000\.tar"):
        read_epochs(stream, plan)


@pytest.mark.parametrize("lost", ["removed", "torn", "of another shard"])
def test_offsets_are_found_again_where_the_sidecar_is_lost(folder: Path, lost: str) -> None:
    plan = plan_of(folder)
    for path in folder.glob("*.offsets.json"):
        if lost == "removed":
            path.unlink()
        else:
            path.write_text("{" if lost == "torn" else (folder / "000.tar.offsets.json").read_text())
    steps = range(plan.steps_per_epoch)
    assert handed_out(plan, folder, steps, 2) == [plan.batch(step).tolist() for step in steps]


def test_offsets_that_lie_stop_the_run(folder: Path) -> None:
    plan = plan_of(folder)
    for path in folder.glob("*.offsets.json"):
        path.write_text(path.read_text().replace('"offsets":[0,', '"offsets":[512,'))
    with open_stream(plan, folder) as stream, pytest.raises(DataError, match="index the folder again"):
        read_epochs(stream, plan)


def test_a_shard_that_cannot_be_read_now_stops_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the storage says nothing about the samples: it must not change a batch."""
    opened = Path.open

    def failing(self: Path, *arguments, **keywords):  # type: ignore[no-untyped-def]
        if self.name == "002.tar":
            raise OSError(5, "Input/output error")
        return opened(self, *arguments, **keywords)

    plan = plan_of(folder)
    monkeypatch.setattr(Path, "open", failing)
    sources = Sources(tries=3, first_delay=0)
    with (
        open_stream(plan, folder, sources=sources) as stream,
        pytest.raises(TransientError, match=r"002\.tar: could not be read in 3 tries .*output"),
    ):
        read_epochs(stream, plan)
    assert stream.bad == {}


def test_a_fault_that_passes_changes_no_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, opened, failures = plan_of(folder), Path.open, 2

    def failing(self: Path, *arguments, **keywords):  # type: ignore[no-untyped-def]
        nonlocal failures
        if self.name == "002.tar" and failures:
            failures -= 1
            raise OSError(110, "Connection timed out")
        return opened(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", failing)
    steps = range(plan.steps_per_epoch)
    assert handed_out(plan, folder, steps, 1, sources=Sources(tries=3, first_delay=0)) == [
        plan.batch(step).tolist() for step in steps
    ]
    assert failures == 0


def test_the_ledger_proves_each_sample_once_through_a_change_of_world(folder: Path, tmp_path: Path) -> None:
    plan, ledger, resized_at = plan_of(folder), tmp_path / "ledger", 2
    for world, steps in ((3, range(resized_at)), (2, range(resized_at, plan.steps_per_epoch))):
        for rank in range(world):
            with open_stream(plan, folder, rank, world, ledger=ledger) as stream:
                for step in steps:
                    stream.step(step)
    lines = [tuple(map(int, line.split())) for line in ledger.read_text().splitlines()]
    assert sorted(sample for _, _, _, sample, _ in lines) == list(range(37))
    assert all(replaced == -1 for *_, replaced in lines)
    places = Counter((step, place) for step, _, place, _, _ in lines)
    assert places == {(step, i): 1 for step in range(plan.steps_per_epoch) for i in range(plan.size(step))}
    for step, rank, place, sample, _ in lines:
        begin, end = plan.bounds(step, rank, 3 if step < resized_at else 2)
        assert begin <= place < end and plan.batch(step)[place] == sample


def test_the_ledger_marks_what_was_replaced(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(tmp_path, COUNTS, {9: BROKEN})
    plan = plan_of(tmp_path)
    lines: list[tuple[int, ...]] = []
    with open_stream(plan, tmp_path, ledger=lambda *line: lines.append(line)) as stream:
        read_epochs(stream, plan)
    assert len(lines) == 37
    marked = [line for line in lines if line[4] != -1]
    assert [line[4] for line in marked] == [9]
    step, _, place, sample, _ = marked[0]
    assert plan.batch(step)[place] == 9 and expected_with_bad(plan, step, {9})[place] == sample != 9


def test_waiting_is_counted_and_closing_is_final_for_the_thread(folder: Path) -> None:
    plan = plan_of(folder)
    stream = open_stream(plan, folder, prefetch=1)
    first = stream.step(0)
    assert stream.waited > 0
    stream.close()
    stream.close()
    again = stream.step(0)  # a closed stream starts anew where it is asked
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
    stream.close()


def test_settings_out_of_range_are_refused(folder: Path) -> None:
    plan = plan_of(folder)
    for change, message in (
        ({"rank": 2, "world": 2}, "rank: 2"),
        ({"micro_batch": 0}, "largest: 0"),
        ({"noise": {"slot": (1,)}}, r"noise: \['slot'\]"),
        ({"prefetch": 0}, "prefetch: 0"),
        ({"memory_limit": 1000}, "lanes x window: 4 open lanes of 2 shards"),
    ):
        with pytest.raises(ValueError, match=message):
            open_stream(plan, folder, **change)
    with pytest.raises(ValueError, match="no image size"):
        open_stream(Plan(index_from_counts([3]), batch_size=1, seed=0), folder)
    with pytest.raises(DataError, match="not a folder"):
        open_stream(plan, folder / "nowhere")
    with open_stream(plan, folder) as stream, pytest.raises(ValueError, match="step: -1"):
        stream.step(-1)


def test_pixels_survive_the_way_to_the_model_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 8, 8, 3)
    images = to_model(pixels)
    assert images.shape == (4, 3, 8, 8) and images.min() == -1 and images.max() == 1
    # torch's own arithmetic, bit for bit: what a batch holds does not depend on who converts.
    assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert np.array_equal(to_pixels(images), pixels)
    assert np.array_equal(to_pixels(images * 1000)[0, 0, 0], [0, 0, 0])
