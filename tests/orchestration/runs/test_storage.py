"""Files are whole or not there, on a disk and on object storage alike."""

import errno
import pickle
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from full_disk import no_file_over

from orchestration.runs import object_storage
from orchestration.runs.storage import LocalStorage, Storage, storage_at


def names(storage: Storage) -> set[str]:
    return {file.name for file in storage.files()}


def test_what_is_written_is_read_listed_moved_and_deleted(storage: Storage) -> None:
    assert storage.files() == []
    storage.write("a.json", b"first")
    storage.write("a.json", b"sec", b"ond")
    storage.write("deep/er/b", memoryview(b"b"))
    storage.write("deep/c", b"")
    assert names(storage) == {"a.json", "deep/er/b", "deep/c"}
    assert names(storage / "deep") == {"er/b", "c"}
    assert storage.read("a.json") == b"second"
    assert (storage / "deep").read("er/b") == b"b"
    assert storage.read("deep/c") == b""

    storage.move("deep", "away/deep")
    storage.move("a.json", "away/a.json")
    assert names(storage) == {"away/deep/er/b", "away/deep/c", "away/a.json"}
    assert storage.read("away/deep/er/b") == b"b"
    storage.delete("away/deep")
    storage.delete("away/a.json")
    storage.delete("away/a.json")
    storage.delete("nothing/of/the/kind")
    assert names(storage) == set()
    with pytest.raises(FileNotFoundError):
        storage.read("away/a.json")
    with pytest.raises(FileNotFoundError):
        (storage / "deep").read("c")


def test_what_is_larger_than_one_upload_is_whole(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage, "PIECE", 7 * 2**20)
    content = np.random.Generator(np.random.Philox(key=[1, 2])).bytes(16 * 2**20 + 12345)
    storage.write("large", b"head", memoryview(content))
    assert storage.read("large") == b"head" + content


def test_a_file_that_is_replaced_while_it_is_read_is_the_old_or_the_new_one(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is gone is not there, whatever the server's answer looks like."""
    opener = type(storage).open
    changes: list[bytes | None] = [b"a longer one" * 100]

    def late(self: Storage, name: str) -> BinaryIO:
        """The object changes between the look at its size and the reading."""
        file = opener(self, name)
        if changes:
            content = changes.pop(0)
            self.delete(name) if content is None else self.write(name, content)
        return file

    monkeypatch.setattr(type(storage), "open", late)
    storage.write("a", b"first")
    assert storage.read("a") in (b"first", b"a longer one" * 100)
    if not isinstance(storage, LocalStorage):  # which holds what it has opened
        changes.append(None)
        with pytest.raises(FileNotFoundError):
            storage.read("a")


def test_what_is_too_large_for_one_copy_is_moved_whole(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage, "COPIED_AT_ONCE", 1000)
    content = np.random.Generator(np.random.Philox(key=[1, 3])).bytes(3_000_000)
    storage.write("deep/large", content)
    storage.write("deep/small", content[:10])
    storage.move("deep", "away")
    assert names(storage) == {"away/large", "away/small"}
    assert storage.read("away/large") == content


def test_names_that_share_a_beginning_are_apart(storage: Storage) -> None:
    storage.write("run/x", b"1")
    storage.write("run~1/x", b"2")
    storage.write("run-2", b"3")
    assert names(storage / "run") == {"x"}
    storage.delete("run")
    assert names(storage) == {"run~1/x", "run-2"}


def test_times_are_the_storages_own(storage: Storage) -> None:
    storage.write("a", b"1")
    (file,) = storage.files()
    assert 0 <= storage.now() - file.modified < 3600
    assert names(storage) == {"a"}  # asking for the time leaves nothing behind


def test_it_is_the_same_place_in_another_process(storage: Storage) -> None:
    (storage / "deep").write("a", b"1")
    assert pickle.loads(pickle.dumps(storage / "deep")).read("a") == b"1"
    assert storage_at((storage / "deep").url).read("a") == b"1"


def test_of_many_who_want_a_name_at_most_one_gets_it(storage: Storage) -> None:
    for number in range(5):
        together = threading.Barrier(6)
        won: list[str | None] = []

        def want(number: int = number, together: threading.Barrier = together, won: list[str | None] = won) -> None:
            together.wait()
            won.append(storage.claim(f"{number}.json", b"me"))

        threads = [threading.Thread(target=want) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [name for name in won if name is not None]
        assert len(won) == 6 and len(winners) <= 1
        if isinstance(storage, LocalStorage):
            assert winners == [f"{number}.json"]
        kept = [name for name in names(storage) if name.startswith(f"{number}")]
        assert kept == winners
        if not winners:
            winners = [name for name in [storage.claim(f"{number}.json", b"me")] if name]
            assert len(winners) == 1  # alone, one always does
        assert storage.claim(f"{number}.json", b"too late") is None
        assert storage.read(winners[0]) == b"me"


def test_a_write_that_fails_leaves_the_file_before_and_nothing_else(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("a", b"before")
    with no_file_over(10_000), pytest.raises(OSError, match="too large") as caught:
        storage.write("a", b"x" * 9_000, b"x" * 9_000)
    assert caught.value.errno == errno.EFBIG
    assert storage.read("a") == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_bucket_that_is_not_there_is_an_error_and_no_empty_folder_to_write_to(s3: str) -> None:
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        storage_at("s3://no-such-bucket/run").write("a", b"1")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ftp://host/runs", "ftp://host/runs is no place for runs; write a path, s3://bucket/prefix"),
        ("s3:///runs", "/runs is no place for runs; write a path, s3://bucket/prefix"),
        ("s3://key:secret@bucket/runs", "s3://bucket/runs: credentials and options do not belong in an address"),
        ("s3://bucket/runs?secret_key=hidden", "s3://bucket/runs.*: credentials and options do not belong"),
    ],
)
def test_an_address_that_cannot_be_is_refused_without_its_secrets(address: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        storage_at(address)
    assert "secret@" not in str(caught.value)
    assert "hidden" not in str(caught.value)
