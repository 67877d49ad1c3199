"""Saving: behind training, by all ranks or by none, and a failure costs a checkpoint but no point of the curve."""

import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from full_disk import no_file_over
from torch import Tensor, nn
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from orchestration.engine import PlainEngine
from orchestration.runs import object_storage, saver
from orchestration.runs.checkpoints import committed, newest_valid
from orchestration.runs.folder import RunFolder
from orchestration.runs.lease import LeaseLostError, check_lease
from orchestration.runs.saver import NotSavedError, Saver, new_token
from orchestration.runs.storage import LocalStorage, Storage, storage_at
from orchestration.worker import DivergedError

SIZE = 1000


@dataclass
class Rank:
    """Half of a state, as an engine deals it out."""

    rank: int
    value: float = 0.0

    def named_state(self, owned: bool, live: bool = False) -> Iterator[tuple[str, dict[str, Tensor]]]:
        assert owned and live
        yield f"layer{self.rank}", {"weight": torch.full((SIZE,), self.value)}


def savers(folder: Storage, board: Store, world: int = 2) -> list[Saver]:
    token = new_token()
    return [Saver(folder, token, rank, world, allowed=lambda: None, board=board) for rank in range(world)]


def point(step: int) -> tuple[str, float, int, int]:
    return ("loss", float(step), step, step)


def points_of(folder: Storage) -> list[list[int]]:
    """Steps of the points of each checkpoint."""
    return [[step for *_, step in checkpoint.points()] for checkpoint in committed(folder)]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it does to the weights is not in it."""
    may_write, write = threading.Event(), LocalStorage.write

    def slow(self: LocalStorage, name: str, *pieces: bytes | memoryview) -> None:
        assert may_write.wait(60)
        write(self, name, *pieces)

    monkeypatch.setattr(LocalStorage, "write", slow)
    engine = PlainEngine(nn.Linear(3, 2))
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    one = Saver(LocalStorage(tmp_path), new_token(), 0, 1, allowed=lambda: None)
    one.save(4, engine, [], {})
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter += 1
    assert committed(LocalStorage(tmp_path)) == []
    may_write.set()
    one.wait(must=True)
    saved = committed(LocalStorage(tmp_path))[0].weights()
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    assert one.newest == 4


def test_parts_of_several_ranks_make_one_checkpoint(storage: Storage) -> None:
    """Rank 0 commits only when every part is there, and nobody is done before."""
    first, second = savers(storage, HashStore())
    first.save(4, Rank(0, 1.0), [point(4)], {"steps": 4})
    assert committed(storage) == []
    second.save(4, Rank(1, 2.0), [], {"steps": 4})
    second.wait(must=True)
    found = newest_valid(storage)
    first.wait(must=True)
    assert found is not None
    assert found.manifest["steps"] == 4
    assert sorted(found.manifest["files"]) == ["curve.json", "part-00000.safetensors", "part-00001.safetensors"]
    weights = found.weights()
    assert torch.equal(weights["layer0"], torch.full((SIZE,), 1.0))
    assert torch.equal(weights["layer1"], torch.full((SIZE,), 2.0))
    assert {file.name.partition("/")[2] for file in storage.files()} == {"manifest.json", *found.manifest["files"]}


def test_several_ranks_need_a_board(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="board: 2 ranks need one"):
        Saver(LocalStorage(tmp_path), new_token(), 0, 2, allowed=lambda: None)


def test_a_full_disk_costs_a_checkpoint_and_no_point(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, engine = LocalStorage(tmp_path / "checkpoints"), Rank(0)
    one = Saver(folder, new_token(), 0, 1, allowed=lambda: None)
    one.save(4, engine, [point(4)], {})
    one.wait()
    with caplog.at_level(logging.WARNING), no_file_over(SIZE):  # the part is larger, the rest is smaller
        for steps in (8, 12):
            one.save(steps, engine, [point(steps)], {})
            one.wait()
            assert f"the checkpoint of step {steps} was not saved: rank 0: [Errno 27] File too large" in caplog.text
    assert [path.name for path in folder.path.iterdir()] == [committed(folder)[0].name]  # nothing is left of the others
    one.save(16, engine, [point(16)], {})
    one.wait(must=True)
    assert points_of(folder) == [[4], [8, 12, 16]]
    one.save(20, engine, [point(20)], {})
    one.wait(must=True)
    assert points_of(folder) == [[4], [8, 12, 16], [20]]


def test_the_last_save_of_a_run_must_not_fail(tmp_path: Path) -> None:
    folder = LocalStorage(tmp_path)
    one = Saver(folder, new_token(), 0, 1, allowed=lambda: None)
    one.save(4, Rank(0), [], {})
    one.wait()
    with no_file_over(SIZE):
        one.save(8, Rank(0), [], {})
        said = rf"{tmp_path}: the checkpoint of step 8 was not saved: rank 0: .*File too large"
        with pytest.raises(NotSavedError, match=rf"{said}.*checkpoint there, of step 4"):
            one.wait(must=True)
    one.save(8, Rank(0), [], {})
    one.wait(must=True)


def test_object_storage_that_does_not_answer_costs_a_checkpoint_and_no_point(
    s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, engine = storage_at(s3), Rank(0)
    one = Saver(folder, new_token(), 0, 1, allowed=lambda: None)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setattr(object_storage, "ATTEMPTS", 1)
        object_storage._system.cache_clear()
        one.save(4, engine, [point(4)], {})
        one.wait()
    object_storage._system.cache_clear()
    assert "the checkpoint of step 4 was not saved: rank 0: " in caplog.text
    assert "NETWORK_CONNECTION" in caplog.text
    assert committed(folder) == []
    one.save(8, engine, [point(8)], {})
    one.wait(must=True)
    assert points_of(folder) == [[4, 8]]


@pytest.mark.parametrize("broken", ["part-00000.safetensors", "part-00001.safetensors", "curve.json", "manifest.json"])
def test_whatever_cannot_be_written_nothing_is_left_and_all_ranks_know(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    kind, write = type(storage), type(storage).write

    def full(self: Storage, name: str, *pieces: bytes | memoryview) -> None:
        if name.endswith(broken):
            raise OSError(28, "No space left on device")
        write(self, name, *pieces)

    both = savers(storage, HashStore())
    with monkeypatch.context() as patch:
        patch.setattr(kind, "write", full)
        for rank, one in enumerate(both):
            one.save(4, Rank(rank), [point(4)] if rank == 0 else [], {})
        culprit = int(broken == "part-00001.safetensors")
        for one in both:
            with pytest.raises(NotSavedError, match=rf"step 4 was not saved: rank {culprit}: .*No space left"):
                one.wait(must=True)
    assert storage.files() == []
    for rank, one in enumerate(both):
        one.save(8, Rank(rank), [point(8)] if rank == 0 else [], {})
    for one in both:
        one.wait(must=True)
    assert points_of(storage) == [[4, 8]]


def test_a_state_that_is_not_finite_is_never_committed_and_ends_every_rank(storage: Storage) -> None:
    """The loss before an update may be finite, and the weights after it not."""
    both = savers(storage, HashStore())
    both[0].save(4, Rank(0), [], {})
    both[1].save(4, Rank(1, torch.nan), [], {})
    for one in both:
        with pytest.raises(DivergedError, match="weight/layer1 is not finite after step 4") as caught:
            one.wait()
        assert caught.value.step == 4
        with pytest.raises(DivergedError):
            one.save(8, Rank(0), [], {})
    assert storage.files() == []


def test_a_driver_that_was_succeeded_commits_nothing(tmp_path: Path) -> None:
    def succeeded() -> None:
        raise LeaseLostError("driver 2 has taken over")

    folder, board, token = LocalStorage(tmp_path), HashStore(), new_token()
    first = Saver(folder, token, 0, 2, allowed=succeeded, board=board)
    second = Saver(folder, token, 1, 2, allowed=lambda: None, board=board)
    first.save(4, Rank(0), [], {})
    second.save(4, Rank(1), [], {})
    with pytest.raises(LeaseLostError):
        first.wait()
    with pytest.raises(NotSavedError):
        second.wait(must=True)
    assert committed(folder) == []


@pytest.mark.parametrize("moment", ["part-00000.safetensors", "part-00001.safetensors", "curve.json"])
def test_a_driver_that_is_succeeded_while_its_ranks_write_commits_nothing(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The lease is asked for last, when nothing but the manifest is missing."""
    run, board, token = RunFolder(storage.url), HashStore(), new_token()
    run.storage.write("leases/000001.json", b"{}")
    kind, write = type(storage), type(storage).write

    def succeeded(self: Storage, name: str, *pieces: bytes | memoryview) -> None:
        write(self, name, *pieces)
        if name.endswith(moment):
            write(run.storage, "leases/000002.json", b"{}")

    monkeypatch.setattr(kind, "write", succeeded)
    both = [Saver(run.checkpoints, token, rank, 2, lambda: check_lease(run, 1), board) for rank in range(2)]
    for rank, one in enumerate(both):
        one.save(4, Rank(rank), [], {})
    with pytest.raises(LeaseLostError, match="driver 2 has taken over from driver 1"):
        both[0].wait()
    with pytest.raises(NotSavedError):
        both[1].wait(must=True)
    assert committed(run.checkpoints) == []


def test_a_rank_that_never_writes_costs_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "PART_SECONDS", 0.1)
    monkeypatch.setattr(saver, "HEARD_SECONDS", 0.1)
    folder = LocalStorage(tmp_path)
    first, _ = savers(folder, HashStore())
    first.save(4, Rank(0), [], {})
    with pytest.raises(NotSavedError, match="rank 0: nothing from rank 1 in 0 s"):
        first.wait(must=True)
    assert folder.files() == []


def one_rank(rank: int, world: int, folder: Path, store: Path) -> None:
    """Rank 1's disk is full at its second save."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    port = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None]
    board, shared = port[0], [port[0].port if port[0] else 0]
    torch.distributed.broadcast_object_list(shared)
    board = board or TCPStore("127.0.0.1", shared[0], is_master=False)
    one = Saver(LocalStorage(folder), "token", rank, world, allowed=lambda: None, board=board)
    for steps in (4, 8, 12):
        with no_file_over(SIZE if rank == 1 and steps == 8 else 2**30):
            one.save(steps, Rank(rank, float(steps)), [point(steps)] if rank == 0 else [], {})
            torch.distributed.all_reduce(torch.ones(1))  # training goes on beside it, on the same connections
            one.wait()
        if steps == 8:
            with pytest.raises(NotSavedError, match=r"rank 1: .*File too large"):
                one.wait(must=True)
    one.wait(must=True)
    if rank == 1:
        torch.distributed.destroy_process_group()


def test_ranks_in_processes_of_their_own_agree_on_what_was_saved(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    torch.multiprocessing.spawn(one_rank, args=(2, folder, tmp_path / "store"), nprocs=2)
    assert [checkpoint.steps for checkpoint in committed(LocalStorage(folder))] == [4, 12]
    assert points_of(LocalStorage(folder)) == [[4], [8, 12]]
    assert len(list(folder.iterdir())) == 2
    weights = committed(LocalStorage(folder))[-1].weights()
    assert {name: float(value.mean()) for name, value in weights.items()} == {"layer0": 12.0, "layer1": 12.0}
