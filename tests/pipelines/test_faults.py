"""Whatever a server, a worker or the data does: the same batches, or an end with a sentence that names the shard."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from faulty_server import FaultyServer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipelines.cache import Cache
from pipelines.errors import DataError, TransientError
from pipelines.index import Index
from pipelines.mixture import Mixture
from pipelines.plan import Plan
from pipelines.sets import WeightedSet, expanded, read_index
from pipelines.shards import read_index as read_local
from pipelines.sources import Sources
from pipelines.stream import MicroBatch, Stream

MakeSet = Callable[..., Index]
COUNTS = [7, 1, 12, 3, 9, 5]  # 37 samples
BROKEN = {"image.png": b"not a picture"}
NOISE = {"slots": (2, 3)}


@pytest.fixture
def folder(tmp_path: Path, make_set: MakeSet) -> Path:
    make_set(tmp_path / "set", COUNTS)
    return tmp_path / "set"


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with FaultyServer.of(folder) as server:
        yield server


def quick(**changes) -> Sources:  # type: ignore[no-untyped-def]
    return Sources(**({"tries": 4, "timeout": 0.5, "first_delay": 0.0, "part": 16384, "connections": 2} | changes))


def plan_of(index: Index, **changes) -> Plan:  # type: ignore[no-untyped-def]
    return Plan(index, **({"batch_size": 8, "seed": 3, "lanes": 4, "window": 2} | changes))


def batches(plan, where: Path | str | None, steps: range, world: int = 1, **changes) -> list[list[MicroBatch]]:  # type: ignore[no-untyped-def]
    """The micro batches of each step, rank by rank."""
    streams = [
        Stream(plan, where, **({"rank": r, "world": world, "micro_batch": 3, "seed": 9, "noise": NOISE} | changes))
        for r in range(world)
    ]
    try:
        return [[micro for stream in streams for micro in stream.step(step)] for step in steps]
    finally:
        for stream in streams:
            stream.close()


def assert_equal(a: list[list[MicroBatch]], b: list[list[MicroBatch]]) -> None:
    """Bit for bit."""
    for x, y in zip(a, b, strict=True):
        for m, n in zip(x, y, strict=True):
            for name in ("images", "weight", "slot_noise", "num_objects", "ids", "places", "masks"):
                left, right = getattr(m, name), getattr(n, name)
                assert (left is None and right is None) or torch.equal(left, right), name


def samples(steps: list[list[MicroBatch]]) -> list[list[int]]:
    return [[int(n) for micro in step for n, w in zip(micro.ids, micro.weight, strict=True) if w] for step in steps]


# --- the same batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_a_set_behind_http_gives_what_its_folder_gives(
    folder: Path, server: FaultyServer, tmp_path: Path, cached: bool, world: int
) -> None:
    plan = plan_of(read_index(server.url, quick()))
    assert plan.index == read_local(folder)
    steps = range(2 * plan.steps_per_epoch)
    cache = Cache(tmp_path / "cache", 10**6) if cached else None
    read = batches(plan, server.url, steps, world, sources=quick(), cache=cache, with_masks=True)
    assert_equal(read, batches(plan, folder, steps, world, with_masks=True))
    if cached:
        whole = [name for name, asked, _ in server.requests if name.endswith(".tar") and asked.startswith("bytes=0-")]
        assert sorted(whole) == [f"{i:03d}.tar" for i in range(6)]  # each once, for all ranks and epochs


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    faults=st.lists(
        st.sampled_from(["500", "503", "reset", "drop", "wrong-range", "whole", "lie", "flip", ""]), max_size=4
    ),
    cached=st.booleans(),
    workers=st.just(0),
)
@example(faults=["drop", "lie", "500"], cached=False, workers=1)
@example(faults=["", "lie"], cached=False, workers=0)  # a part of a shard that was checked as a whole before
@example(faults=["", "flip"], cached=False, workers=0)
@example(faults=["", "", "flip"], cached=False, workers=0)
@example(faults=["", "", "", "flip"], cached=False, workers=0)
def test_faults_that_pass_change_no_batch(
    folder: Path,
    server: FaultyServer,
    tmp_path_factory: pytest.TempPathFactory,
    faults: list[str],
    cached: bool,
    workers: int,
) -> None:
    """The first answers for every shard fail as told; bytes that are not the shard's are forgiven once."""
    wrong = [i for i, fault in enumerate(faults) if fault in ("lie", "flip")]
    faults = [fault for i, fault in enumerate(faults) if i not in wrong[1:]]
    server.fault = lambda name, number: faults[number] if number < len(faults) and name.endswith(".tar") else ""
    server.asked.clear()
    plan = plan_of(read_local(folder))
    cache = Cache(tmp_path_factory.mktemp("cache"), 10**6) if cached else None
    steps = range(plan.steps_per_epoch)
    read = batches(plan, server.url, steps, sources=quick(tries=8), cache=cache, decode_workers=workers)
    assert_equal(read, batches(plan, folder, steps))


def test_a_cache_that_is_too_small_is_no_fault(folder: Path, server: FaultyServer, tmp_path: Path) -> None:
    plan = plan_of(read_local(folder))
    steps = range(plan.steps_per_epoch)
    read = batches(plan, server.url, steps, sources=quick(tries=8), cache=Cache(tmp_path / "cache", 100))
    assert_equal(read, batches(plan, folder, steps))


def test_a_shard_that_was_checked_is_read_by_rows_and_only_the_window_s(folder: Path, server: FaultyServer) -> None:
    """A resume reads one window for each open lane; a second epoch reads rows, not shards."""
    plan = plan_of(read_local(folder), lanes=1, window=1, batch_size=4)
    with Stream(
        plan, server.url, rank=0, world=1, micro_batch=4, seed=9, noise={}, sources=quick(part=10**6), prefetch=1
    ) as stream:
        stream.step(5)
        asked = {name for name, *_ in server.requests if name.endswith(".tar")}
        wanted = {
            plan.index.shards[piece.shard].name
            for step in range(5, 8)  # one handed out, one ready, one being made
            for span in plan.spans(step, 0, plan.size(step))
            for piece in plan.pieces(span.window)
        }
        assert asked <= wanted


def test_brace_patterns_and_several_folders_are_one_set(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(tmp_path / "a", [4, 2, 3])
    make_set(tmp_path / "b", [5, 1])
    both = read_index(f"{tmp_path}/{{a,b}}")
    assert [shard.samples for shard in both.shards] == [4, 2, 3, 5, 1] and both.size == (8, 6)
    assert both.about["masks"] is True
    some = read_index(f"{tmp_path}/a/{{002,000}}.tar")
    assert [shard.name for shard in some.shards] == ["002.tar", "000.tar"]
    plan = plan_of(both)
    read = samples(batches(plan, None, range(plan.steps_per_epoch)))
    assert sorted(n for step in read for n in step) == list(range(15)) and read == [
        plan.batch(step).tolist() for step in range(2)
    ]
    assert expanded("s3://x/{a,b}/{8..10}.tar")[:3] == ["s3://x/a/8.tar", "s3://x/a/9.tar", "s3://x/a/10.tar"]
    for pattern, sentence in (
        (f"{tmp_path}/a/{{000..003}}.tar", r"a/003\.tar: not in the folder's index\.json"),
        (f"{tmp_path}/{{a,c}}", r"c: no index\.json in it; write one .*: slotforge shards index"),
        (f"{tmp_path}/c/{{000..003}}.tar", r"c: no index\.json in it; write one .*: slotforge shards index"),
        (f"{tmp_path}/{{a,a}}", "twice"),
        (f"{tmp_path}/{{a,b", "braces"),
    ):
        with pytest.raises(DataError, match=sentence):
            read_index(pattern)


@pytest.mark.parametrize("world", [1, 3])
def test_a_mixture_of_places_comes_in_its_own_order(
    folder: Path, server: FaultyServer, tmp_path: Path, make_set: MakeSet, world: int
) -> None:
    make_set(tmp_path / "other", [6, 11], {3: BROKEN})
    where = [WeightedSet(server.url, 2), WeightedSet(str(tmp_path / "other"), 1)]
    parts = [read_index(entry, quick()) for entry in where]
    mixture = Mixture(
        list(zip(parts, (2, 1), strict=True)), read_index(where, quick()), batch_size=9, seed=3, lanes=3, window=2
    )
    steps = range(8)
    read = samples(batches(mixture, None, steps, world, sources=quick()))
    bad = 37 + 3
    for step in steps:
        planned = mixture.batch(step).tolist()
        assert [a for a, b in zip(read[step], planned, strict=True) if a != b or b == bad] == [
            a for a, b in zip(read[step], planned, strict=True) if b == bad
        ]
        assert bad not in read[step]


# --- bad data --------------------------------------------------------------------------------------------------------


def truncated(server: FaultyServer) -> None:
    server.files["003.tar"] = server.files["003.tar"][:-512]


def damaged(server: FaultyServer) -> None:
    data = bytearray(server.files["003.tar"])
    data[700] ^= 1
    server.files["003.tar"] = bytes(data)


def emptied(server: FaultyServer) -> None:
    server.files["003.tar"] = b""


def gone(server: FaultyServer) -> None:
    del server.files["003.tar"]


def changed_for_all(folder: Path, server: FaultyServer, damage: Callable[[FaultyServer], None]) -> None:
    """The shard 003.tar, on the server and in its folder."""
    damage(server)
    content = server.files.get("003.tar")
    (folder / "003.tar").unlink() if content is None else (folder / "003.tar").write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, damaged, emptied, gone])
@pytest.mark.parametrize("cached", [False, True])
def test_a_bad_shard_is_filled_alike_for_every_world(
    folder: Path, server: FaultyServer, tmp_path: Path, damage: Callable[[FaultyServer], None], cached: bool
) -> None:
    plan = plan_of(read_local(folder))
    changed_for_all(folder, server, damage)
    steps = range(plan.steps_per_epoch)
    limit = {"bad_limit": 3}
    local = samples(batches(plan, folder, steps, **limit))
    assert not any(20 <= sample < 23 for step in local for sample in step)
    for world in (1, 2, 5):
        cache = Cache(tmp_path / f"cache-{world}", 10**6) if cached else None
        assert samples(batches(plan, server.url, steps, world, sources=quick(), cache=cache, **limit)) == local
    stream = Stream(plan, server.url, rank=0, world=1, micro_batch=8, seed=9, noise={}, sources=quick(), bad_limit=2)
    with stream, pytest.raises(DataError, match=r"limit of 2; most in 003\.tar \(3\)"):
        for step in steps:
            stream.step(step)


@pytest.mark.parametrize(
    ("where", "damage"),
    [("folder", damaged), ("folder", gone), ("http", truncated), ("http", gone), ("cache", damaged)],
)
def test_a_shard_that_was_good_and_changes_stops_whoever_knew_it(
    folder: Path, server: FaultyServer, tmp_path: Path, damage: Callable[[FaultyServer], None], where: str
) -> None:
    """No rank fills what it, or another one before it, has had as it was planned; who starts after that agrees."""
    plan = plan_of(read_local(folder))
    cache = Cache(tmp_path / "cache", 10**6) if where == "cache" else None
    place = folder if where == "folder" else server.url
    settings = {"sources": quick(), "cache": cache}
    first = range(plan.steps_per_epoch)
    lines: list[tuple[int, ...]] = []

    def reader(rank: int, world: int) -> Stream:
        ledger = lambda *line: lines.append(line)  # noqa: E731
        options = {"micro_batch": 8, "seed": 9, "noise": {}, "prefetch": 1, "ledger": ledger}
        return Stream(plan, place, rank=rank, world=world, **options, **settings)

    ahead, behind = reader(0, 1), reader(1, 2)
    with ahead, behind:
        for step in first:
            ahead.step(step)
        changed_for_all(folder, server, damage)
        if cache is not None:  # as on another node; what a cache holds stays good
            for path in cache.folder.glob("*.shard"):
                path.unlink()
        with pytest.raises(DataError, match=r"003\.tar: .* it was good before in this run"):
            for step in range(plan.steps_per_epoch, 3 * plan.steps_per_epoch):
                ahead.step(step)
        assert ahead.bad == {} and all(replaced == -1 for *_, replaced in lines)
        lines.clear()
        for step in first:  # it knows nothing of what the shard was
            behind.step(step)
        assert behind.bad and set(behind.bad) <= {20, 21, 22}
    again = samples(batches(plan, place, first, 1, **settings))
    assert samples(batches(plan, place, first, 3, **settings)) == again
    assert all(again[step][place] == sample for step, _, place, sample, _ in lines)


@pytest.mark.parametrize("where", ["folder", "http"])
def test_a_shard_that_is_only_written_again_goes_on(folder: Path, server: FaultyServer, where: str) -> None:
    plan = plan_of(read_local(folder))
    place = folder if where == "folder" else server.url
    expected = batches(plan, folder, range(2 * plan.steps_per_epoch))
    options = {"micro_batch": 3, "seed": 9, "noise": NOISE, "sources": quick(), "prefetch": 1}
    with Stream(plan, place, rank=0, world=1, **options) as stream:
        read = [stream.step(step) for step in range(plan.steps_per_epoch)]
        os.utime(folder / "003.tar")
        server.retagged = True
        read += [stream.step(step) for step in range(plan.steps_per_epoch, 2 * plan.steps_per_epoch)]
    assert_equal(read, expected)


# --- an end, never a hang --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "hang", "reset"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_server_that_stays_ill_stops_the_run_and_names_the_shard(
    folder: Path, server: FaultyServer, tmp_path: Path, fault: str, cached: bool
) -> None:
    plan = plan_of(read_local(folder))
    server.fault = lambda name, number: fault if name == "004.tar" else ""
    cache = Cache(tmp_path / "cache", 10**6) if cached else None
    sources = quick(tries=2, timeout=0.1)
    stream = Stream(plan, server.url, rank=0, world=1, micro_batch=8, seed=9, noise={}, sources=sources, cache=cache)
    with stream, pytest.raises(TransientError, match=r"set/004\.tar: could not be read in 2 tries .*last checkpoint"):
        for step in range(plan.steps_per_epoch):
            stream.step(step)
    assert stream.bad == {}
    server.fault = lambda name, number: ""  # it recovers: the run goes on where it was
    steps = range(2, plan.steps_per_epoch)
    assert_equal(batches(plan, server.url, steps, sources=quick(), cache=cache), batches(plan, folder, steps))


def test_a_folder_that_is_not_mounted_is_no_fault_of_its_shards(folder: Path) -> None:
    plan = plan_of(read_local(folder))
    stream = Stream(plan, folder, rank=0, world=1, micro_batch=8, seed=9, noise={}, sources=quick(tries=2), prefetch=1)
    folder.rename(folder.with_name("unmounted"))
    with stream, pytest.raises(TransientError, match="is not there"):
        stream.step(0)
    assert stream.bad == {}


def test_closing_does_not_wait_for_a_retry(folder: Path, server: FaultyServer) -> None:
    plan = plan_of(read_local(folder))
    server.fault = lambda name, number: "500"
    slow = Sources(first_delay=60, longest_delay=60)
    stream = Stream(plan, server.url, rank=0, world=1, micro_batch=8, seed=9, noise={}, sources=slow)
    threading.Timer(0.2, stream._sources.end).start()
    start = time.monotonic()
    with pytest.raises(DataError):
        stream.step(0)
    stream.close()
    assert time.monotonic() - start < 30


def test_an_index_that_cannot_be_had_is_a_sentence(server: FaultyServer) -> None:
    server.fault = lambda name, number: "500"
    with pytest.raises(TransientError, match=r"index\.json: could not be read in 2 tries"):
        read_index(server.url, quick(tries=2))
    server.fault = lambda name, number: ""
    server.files["index.json"] = b"[]"
    with pytest.raises(DataError, match=r"^http://.*/set/index\.json: not an index"):
        read_index(server.url, quick())
    del server.files["index.json"]
    with pytest.raises(DataError, match=r"set: no index\.json in it; write one .*: slotforge shards index"):
        read_index(server.url, quick())
    with pytest.raises(DataError, match="allow_pipe"):
        read_index("pipe:cat /nowhere/{name}")


def test_a_set_behind_a_command(folder: Path) -> None:
    where, sources = f"pipe:cat {folder}/{{name}}", quick(allow_pipe=True, timeout=10)
    plan = plan_of(read_index(where, sources))
    assert_equal(batches(plan, where, range(2), sources=sources), batches(plan, folder, range(2)))


# --- decoding in processes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_decode_workers_does_not_enter_the_batches(
    tmp_path: Path, make_set: MakeSet, workers: int
) -> None:
    make_set(tmp_path, [20, 30, 14], {5: BROKEN, 21: {"image.png": None}, 40: {"masks.png": None}, 41: {"json": b"{"}})
    plan = plan_of(read_local(tmp_path), batch_size=16)
    steps = range(2 * plan.steps_per_epoch)
    alone = batches(plan, tmp_path, steps, with_masks=True)
    assert_equal(batches(plan, tmp_path, steps, with_masks=True, decode_workers=workers), alone)
    if workers == 1:  # after a seek too
        assert_equal(batches(plan, tmp_path, range(3, 4), decode_workers=1), batches(plan, tmp_path, range(3, 4)))


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_decode_worker_that_dies_or_stalls_is_replaced(folder: Path, blow: signal.Signals) -> None:
    plan = plan_of(read_local(folder))
    stream = Stream(plan, folder, rank=0, world=1, micro_batch=3, seed=9, noise=NOISE, decode_workers=2, prefetch=1)
    stream._decoder._timeout = 0.5  # type: ignore[attr-defined]
    with stream:
        read = [stream.step(step) for step in range(3)]  # both have answered
        for worker in stream._decoder._workers:  # type: ignore[attr-defined]
            os.kill(worker.process.pid, blow)
        read += [stream.step(step) for step in range(3, 8)]
    assert_equal(read, batches(plan, folder, range(8)))


def test_workers_that_keep_dying_stop_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(read_local(folder))
    monkeypatch.setattr("pipelines.decoding.processes.PROGRAM", "raise SystemExit(5)")
    stream = Stream(plan, folder, rank=0, world=1, micro_batch=3, seed=9, noise={}, decode_workers=1)
    with stream, pytest.raises(DataError, match=r"decode worker \d+ ended with 5 .*decode_workers: 0"):
        stream.step(0)


def test_memory_shared_with_workers_is_used_again(folder: Path) -> None:
    plan = plan_of(read_local(folder))
    with Stream(plan, folder, rank=0, world=1, micro_batch=3, seed=9, noise={}, decode_workers=1) as stream:
        blocks = []
        for step in range(4 * plan.steps_per_epoch):
            stream.step(step)
            blocks.append(stream._decoder._arena._bytes)  # type: ignore[attr-defined]
        assert blocks[-1] == blocks[plan.steps_per_epoch]


def test_no_worker_outlives_its_stream(folder: Path) -> None:
    plan = plan_of(read_local(folder))
    with Stream(plan, folder, rank=0, world=1, micro_batch=3, seed=9, noise={}, decode_workers=2) as stream:
        stream.step(0)
        processes = [worker.process for worker in stream._decoder._workers]  # type: ignore[attr-defined]
        assert len(processes) == 2 and all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)
    with pytest.raises(ValueError, match="decode_workers: -1"):
        Stream(plan, folder, rank=0, world=1, micro_batch=3, seed=9, noise={}, decode_workers=-1)
