"""A cache holds what it says and no more, whoever shares it and whoever dies in it."""

import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from pipelines.cache import Cache, NoRoomError
from pipelines.errors import ContentError, TransientError

URL = "https://host/set/000.tar"


def content(number: int, size: int = 100) -> bytes:
    return number.to_bytes(4, "big") * (size // 4)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def giving(data: bytes, calls: list[bytes] | None = None) -> Callable[[BinaryIO], None]:
    def download(file: BinaryIO) -> None:
        if calls is not None:
            calls.append(data)
        file.seek(0)
        file.write(data)

    return download


def forbidden(file: BinaryIO) -> None:
    raise AssertionError("it was to come from the cache")


def get(cache: Cache, data: bytes, url: str = URL, download: Callable[[BinaryIO], None] | None = None) -> bytes:
    with cache.shard(url, digest(data), len(data), download or giving(data)) as file:
        return file.read()


def held(folder: Path) -> int:
    """Bytes in the folder, while nobody may take more of it."""
    total = 0
    with (folder / "room.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.glob("*.*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def test_a_shard_is_downloaded_once_and_told_apart_by_address_and_checksum(tmp_path: Path) -> None:
    calls: list[bytes] = []
    a, b, c = content(1), content(2), content(3)
    for _ in range(2):
        for cache in (Cache(tmp_path, 1000), Cache(tmp_path, 1000)):
            assert get(cache, a, download=giving(a, calls)) == a
            assert get(cache, b, "https://other/set/000.tar", giving(b, calls)) == b  # an equal file name
            assert get(cache, c, download=giving(c, calls)) == c  # an equal address, indexed anew
    assert calls == [a, b, c]
    assert not list(tmp_path.glob("*.part"))


def test_the_limit_holds_and_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 300)
    for number in (1, 2, 3):
        get(cache, content(number))
        time.sleep(0.01)
    get(cache, content(1), download=forbidden)
    time.sleep(0.01)
    get(cache, content(4))
    assert held(tmp_path) == 300
    for number in (1, 3, 4):
        get(cache, content(number), download=forbidden)
    calls: list[bytes] = []
    get(cache, content(2), download=giving(content(2), calls))
    assert len(calls) == 1 and held(tmp_path) == 300


def test_a_shard_in_use_stays_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    cache, other = Cache(tmp_path, 250), Cache(tmp_path, 250)
    first, second = content(1), content(2)
    with (
        cache.shard(URL, digest(first), 100, giving(first)) as a,
        other.shard(URL, digest(second), 100, giving(second)),
    ):
        with pytest.raises(NoRoomError, match="200 of 250 are in use"):
            get(other, content(3))
        assert a.read() == first and held(tmp_path) == 200
    get(other, content(3))
    assert held(tmp_path) == 200
    with pytest.raises(NoRoomError, match="252 bytes do not fit into a cache of 250"):
        get(cache, content(5, 252))
    with pytest.raises(ValueError, match="limit: 0"):
        Cache(tmp_path, 0)


def test_what_does_not_match_its_checksum_never_gets_in(tmp_path: Path) -> None:
    cache, good, calls = Cache(tmp_path, 1000), content(1), []

    def once_wrong(file: BinaryIO) -> None:
        giving(good if calls else content(2), calls)(file)

    assert get(cache, good, download=once_wrong) == good and len(calls) == 2
    with pytest.raises(ContentError, match="checksum"):
        get(cache, content(3), download=giving(content(4)))
    with pytest.raises(OSError, match="no answer"):
        get(cache, content(3), download=_failing)
    assert len(list(tmp_path.glob("*.shard"))) == 1 and not list(tmp_path.glob("*.part"))
    assert get(cache, content(3)) == content(3)


def _failing(file: BinaryIO) -> None:
    file.write(b"half")
    raise OSError("no answer")


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + b"!", lambda data: data[:50], lambda data: b""])
def test_damage_of_the_disk_is_found_by_the_next_process(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    data = content(1)
    get(Cache(tmp_path, 1000), data)
    (path,) = tmp_path.glob("*.shard")
    path.write_bytes(damage(data))
    calls: list[bytes] = []
    assert get(Cache(tmp_path, 1000), data, download=giving(data, calls)) == data and len(calls) == 1


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    data = content(1)
    program = (
        "import sys, time; from pipelines.cache import Cache\n"
        "def stuck(file):\n    file.write(b'half'); file.flush(); print('there', flush=True); time.sleep(60)\n"
        f"with Cache(sys.argv[1], 1000).shard({URL!r}, {digest(data)!r}, 100, stuck): pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    assert len(list(tmp_path.glob("*.part"))) == 1
    with pytest.raises(TransientError, match=r"another process .* without progress for 0\.1 s"):
        get(Cache(tmp_path, 1000, patience=0.1), data)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    get(Cache(tmp_path, 1000), content(2))  # another shard's download tidies up
    assert not list(tmp_path.glob("*.part")) and held(tmp_path) == 100
    assert get(Cache(tmp_path, 1000), data) == data


def test_a_download_in_progress_is_never_taken_for_a_leftover(tmp_path: Path) -> None:
    there, go_on = threading.Event(), threading.Event()

    def slow(file: BinaryIO) -> None:
        there.set()
        assert go_on.wait(20)
        giving(content(1))(file)

    results: list[bytes] = []
    thread = threading.Thread(target=lambda: results.append(get(Cache(tmp_path, 250), content(1), download=slow)))
    thread.start()
    assert there.wait(20)
    get(Cache(tmp_path, 250), content(2))
    with pytest.raises(NoRoomError, match="in use"):  # its bytes count already
        get(Cache(tmp_path, 150), content(3))
    go_on.set()
    thread.join()
    assert results == [content(1)] and held(tmp_path) == 100


def test_many_processes_download_each_shard_once_within_the_limit(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache", tmp_path / "log"
    program = (
        "import hashlib, os, sys, time; from pipelines.cache import Cache\n"
        "cache = Cache(sys.argv[1], 1000)\n"
        "def data(n): return bytes([n]) * 100\n"
        "for n in range(8):\n"
        "    def download(file):\n"
        "        os.write(log, f'{n}\\n'.encode()); time.sleep(0.02); file.seek(0); file.write(data(n))\n"
        "    log = os.open(sys.argv[2], os.O_APPEND | os.O_CREAT | os.O_WRONLY)\n"
        "    with cache.shard('u', hashlib.sha256(data(n)).hexdigest(), 100, download) as file:\n"
        "        assert file.read() == data(n)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(folder), str(log)]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert sorted(map(int, log.read_text().split())) == list(range(8))
    assert held(folder) == 800


def test_threads_that_fight_for_too_little_room_get_the_right_bytes(tmp_path: Path) -> None:
    wrong: list[object] = []

    def work(seed: int) -> None:
        cache = Cache(tmp_path, 350)
        for i in range(25):
            data = content((seed * 7 + i * 3) % 6)
            try:
                if get(cache, data) != data:
                    wrong.append(i)
            except NoRoomError:
                pass
            except BaseException as error:
                wrong.append(error)
            if held(tmp_path) > 350:
                wrong.append(held(tmp_path))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and os.listdir(tmp_path)
