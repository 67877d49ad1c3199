"""One driver at a time, on a disk and on object storage."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from full_disk import no_file_over
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.recipe import RecipeError
from orchestration.runs import lease
from orchestration.runs.folder import RunFolder
from orchestration.runs.lease import Lease, LeaseHeldError, LeaseLostError, check_lease
from orchestration.runs.object_storage import ObjectStorage
from orchestration.runs.storage import File, LocalStorage

HOLD = """
import sys, time
from orchestration.runs.folder import RunFolder
from orchestration.runs.lease import Lease
with Lease(RunFolder(sys.argv[1])) as lease:
    print(lease.number, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(place: str) -> RunFolder:
    return RunFolder(f"{place}/run")


def holder(folder: RunFolder) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder.url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip().isdigit()
    return process


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def later(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage's clock moves on by more than a lease holds."""
    kind, now = type(folder.storage), type(folder.storage).now
    monkeypatch.setattr(kind, "now", lambda self: now(self) + lease.LEASE_SECONDS + 1)


def test_a_second_driver_is_refused_until_the_first_is_killed(folder: RunFolder) -> None:
    process = holder(folder)
    try:
        with pytest.raises(LeaseHeldError, match=f"run run: process {process.pid} on "), Lease(folder):
            pass
    finally:
        process.kill()
        process.wait()
    with Lease(folder) as mine:
        assert mine.number == 2
        check_lease(folder, 2)
        with pytest.raises(LeaseLostError, match="driver 2 has taken over from driver 1"):
            check_lease(folder, 1)


def test_a_lease_that_was_returned_is_free(folder: RunFolder) -> None:
    for number in (1, 2, 3):
        with Lease(folder) as mine:
            assert mine.number == number


@pytest.mark.parametrize("name", ["000001.json", "000001-abcd.json"])
@pytest.mark.parametrize(
    "content", [json.dumps({"host": "elsewhere", "machine": "m", "pid": 1, "started": "1", "since": "today"}), ""]
)
def test_another_machines_driver_counts_as_dead_without_a_heartbeat(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    """One that has not written its name yet, too."""
    folder.storage.write(f"leases/{name}", content.encode())
    with pytest.raises(LeaseHeldError, match="process 1 on elsewhere" if content else "just now"), Lease(folder):
        pass
    later(folder, monkeypatch)
    with Lease(folder) as mine:
        assert mine.number == 2


def test_another_machines_clock_does_not_matter(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"host": "elsewhere", "machine": "m", "pid": 1, "started": "1", "since": "today"}
    folder.storage.write("leases/000001.json", json.dumps(content).encode())
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(LeaseHeldError), Lease(folder):
        pass


def test_a_heartbeat_keeps_a_lease_young(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def modified() -> float:
        return max(file.modified for file in (folder.storage / "leases").files())

    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)
    with Lease(folder):
        first = modified()
        until(lambda: modified() > first)
        with pytest.raises(LeaseHeldError), Lease(folder):
            pass


def test_of_many_drivers_at_once_one_gets_the_run(folder: RunFolder) -> None:
    together, over = threading.Barrier(5), threading.Event()
    numbers: list[int] = []
    refused: list[str] = []

    def drive() -> None:
        together.wait()
        try:
            with Lease(folder) as mine:
                numbers.append(mine.number)
                over.wait(60)
        except LeaseHeldError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=drive) for _ in range(5)]
    for thread in threads:
        thread.start()
    until(lambda: len(numbers) + len(refused) == 5)
    over.set()
    for thread in threads:
        thread.join()
    assert len(numbers) == 1
    assert len(refused) == 4


def test_a_driver_that_slept_while_it_took_a_lease_has_not_got_it(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim grew old, and another driver took the next number."""
    kind, claim = type(folder.storage), type(folder.storage).claim

    def slow(self: LocalStorage, name: str, content: bytes) -> str | None:
        found = claim(self, name, content)
        monkeypatch.setattr(kind, "claim", claim)
        self.write("000002.json", json.dumps({"host": "there", "machine": "m", "since": "now", "pid": 7}).encode())
        return found

    monkeypatch.setattr(kind, "claim", slow)
    with pytest.raises(LeaseHeldError, match="process 7 on there"), Lease(folder):
        pass


def test_a_number_that_was_withdrawn_is_not_passed_over(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver sees a claim to the first number; before it reads it the claim is withdrawn, and another's stands."""
    leases, kind = folder.storage / "leases", type(folder.storage)
    leases.write("000001-rival.json", b"{}")
    first, read = Lease(folder), kind.read

    def late(self: LocalStorage, name: str) -> bytes:
        if name == "000001-rival.json":
            monkeypatch.setattr(kind, "read", read)
            self.delete(name)
            first.__enter__()
        return read(self, name)

    monkeypatch.setattr(kind, "read", late)
    with pytest.raises(LeaseHeldError), Lease(folder):
        pass
    assert first.number == 1
    first.__exit__(None, None, None)


def test_a_folder_that_cannot_be_written_is_told(s3: str) -> None:
    with pytest.raises(RecipeError, match=r"s3://nowhere/run: the run's folder cannot be written.*SLOTFORGE_RUNS"):
        Lease(RunFolder("s3://nowhere/run")).__enter__()


def test_a_full_disk_does_not_end_a_lease(tmp_path: Path) -> None:
    """A heartbeat writes nothing."""
    storage = LocalStorage(tmp_path)
    storage.write("lease", b"content")
    os.utime(tmp_path / "lease", (1, 1))
    with no_file_over(0):
        with pytest.raises(OSError, match="too large"):
            storage.write("other", b"content")
        storage.touch("lease", b"content")
    (file,) = storage.files()
    assert file.modified > 1


class Stepwise(ObjectStorage):
    """Objects in memory; each request waits until it is its caller's turn."""

    def __init__(self, objects: dict[str, bytes], turn: Callable[[], None]) -> None:
        super().__init__("memory://bucket/leases")
        self._objects, self._turn = objects, turn

    def write(self, name: str, *pieces: bytes | memoryview) -> None:
        self._turn()
        self._objects[name] = b"".join(pieces)

    def files(self) -> list[File]:
        self._turn()
        return [File(name, 0.0) for name in self._objects]

    def delete(self, name: str) -> None:
        self._turn()
        del self._objects[name]


@settings(max_examples=300, deadline=None)
@given(drivers=st.integers(2, 4), turns=st.lists(st.integers(0, 3), max_size=40))
def test_whatever_the_order_of_their_requests_two_never_win(drivers: int, turns: list[int]) -> None:
    objects: dict[str, bytes] = {}
    granted = [threading.Semaphore(0) for _ in range(drivers)]
    asked = [threading.Semaphore(0) for _ in range(drivers)]
    won: dict[int, str | None] = {}

    def drive(driver: int) -> None:
        def turn() -> None:
            asked[driver].release()
            granted[driver].acquire()

        won[driver] = Stepwise(objects, turn).claim("000001.json", b"")
        asked[driver].release()

    threads = [threading.Thread(target=drive, args=(driver,), daemon=True) for driver in range(drivers)]
    for thread in threads:
        thread.start()
    for semaphore in asked:
        semaphore.acquire()
    order = [turn % drivers for turn in turns] + list(range(drivers)) * 3
    for driver in order:  # who is done already has no request left
        if driver not in won:
            granted[driver].release()
            asked[driver].acquire()
    winners = [name for name in won.values() if name is not None]
    assert len(won) == drivers
    assert len(winners) <= 1
    assert list(objects) == winners
    if not winners:
        assert Stepwise(objects, lambda: None).claim("000001.json", b"") is not None
