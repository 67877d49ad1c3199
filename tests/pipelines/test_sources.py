"""Files come whole and unchanged, or not at all and with a sentence, from HTTP and S3 servers that fail."""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_server import FaultyServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import s3_server

from pipelines.errors import DataError, TransientError
from pipelines.sources import AbsentError, ChangedError, Sources, Version, join, local_path, shown

CONTENT = np.random.default_rng(0).bytes(10_007)
PASSING = ["500", "503", "429", "408", "reset", "drop", "wrong-range", "whole", ""]


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer({"a.tar": CONTENT, "empty": b""}) as server:
        yield server


def quick(**changes) -> Sources:  # type: ignore[no-untyped-def]
    return Sources(**({"tries": 4, "timeout": 0.3, "first_delay": 0.0, "part": 1024, "connections": 3} | changes))


def fetched(sources: Sources, url: str, size: int = len(CONTENT)) -> tuple[Version, bytes]:
    content = bytearray(size)

    def write(position: int, data: bytes) -> None:
        content[position : position + len(data)] = data

    version = sources.fetch(url, size, write)
    assert len(content) == size
    return version, bytes(content)


def test_a_file_comes_whole_in_parts_and_by_range(server: FaultyServer) -> None:
    sources, url = quick(), join(server.url, "a.tar")
    assert sources.read(url) == CONTENT
    version, content = fetched(sources, url)
    assert content == CONTENT and version.size == len(CONTENT)
    ranges = {asked for _, asked, status in server.requests if status == 206}
    assert ranges == {f"bytes={a}-{min(a + 1024, len(CONTENT)) - 1}" for a in range(0, len(CONTENT), 1024)}
    for first, last in ((0, 1), (5, 5000), (9000, 10_007), (77, 77)):
        assert sources.read_range(url, first, last, version) == CONTENT[first:last]
    assert sources.read(join(server.url, "empty")) == b""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    faults=st.lists(st.sampled_from(PASSING), max_size=3),
    part=st.sampled_from([900, 5000, 20_000]),
    connections=st.integers(1, 4),
)
def test_faults_that_pass_never_change_a_byte(
    server: FaultyServer, faults: list[str], part: int, connections: int
) -> None:
    """Each of the first answers fails as told; no part fails more often than there are tries."""
    server.fault = lambda name, number: faults[number] if number < len(faults) else ""
    sources = quick(part=part, connections=connections, tries=8)  # some to spare for a machine that stops
    server.asked.clear()
    assert fetched(sources, join(server.url, "a.tar"))[1] == CONTENT
    server.asked.clear()
    assert sources.read(join(server.url, "a.tar")) == CONTENT


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_server_that_stalls_is_given_up_and_asked_again(server: FaultyServer, fault: str) -> None:
    server.fault = lambda name, number: fault if number == 0 else ""
    assert quick(timeout=0.15).read(join(server.url, "a.tar")) == CONTENT
    server.fault = lambda name, number: fault
    with pytest.raises(TransientError, match=r"a\.tar: could not be read in 2 tries over \d+ s"):
        quick(timeout=0.1, tries=2).read(join(server.url, "a.tar"))


def test_what_has_come_is_not_asked_for_again(server: FaultyServer) -> None:
    server.fault = lambda name, number: "drop" if number < 2 else ""
    assert quick(part=20_000).read(join(server.url, "a.tar")) == CONTENT
    starts = [int(asked.removeprefix("bytes=").rstrip("-") or 0) if asked else 0 for _, asked, _ in server.requests]
    assert starts == [0, 5003, 5003 + 2502]


def test_a_server_without_ranges_is_read_through_but_not_once_a_part(server: FaultyServer) -> None:
    server.fault = lambda name, number: "whole"
    sources, url = quick(), join(server.url, "a.tar")
    version, content = fetched(sources, url)
    assert content == CONTENT and not version.ranges and len(server.requests) == 2
    assert sources.read_range(url, 3000, 3500, version) == CONTENT[3000:3500]


@pytest.mark.parametrize("fault", ["500", "reset", "drop", "wrong-range", "429"])
def test_the_delays_double_and_have_an_end(server: FaultyServer, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    waits: list[float] = []
    server.fault = lambda name, number: fault if fault != "drop" or number == 0 else "500"
    sources = Sources(tries=6, timeout=1, first_delay=0.5, longest_delay=3, sleep=waits.append)
    with caplog.at_level(logging.WARNING), pytest.raises(TransientError) as raised:
        fetched(sources, join(server.url, "a.tar"))
    assert waits == [0.5, 1, 2, 3, 3]
    assert "a.tar: could not be read in 6 tries" in str(raised.value) and "last checkpoint" in str(raised.value)
    assert len([r for r in caplog.records if "a.tar" in r.getMessage()]) == 5


def test_waiting_ends_when_the_stream_is_closed(server: FaultyServer) -> None:
    server.fault = lambda name, number: "500"
    sources = Sources(first_delay=60, longest_delay=60)
    threading.Timer(0.1, sources.end).start()
    start = time.monotonic()
    with pytest.raises(DataError, match="was ended"):
        sources.read(join(server.url, "a.tar"))
    assert time.monotonic() - start < 30


def test_absent_refused_and_of_another_size_are_not_tried_again(server: FaultyServer) -> None:
    sources = quick()
    with pytest.raises(AbsentError, match="nowhere"):
        sources.read(join(server.url, "nowhere"))
    server.fault = lambda name, number: "403"
    with pytest.raises(DataError, match=r"a\.tar: HTTP 403; check the address"):
        sources.read(join(server.url, "a.tar"))
    server.fault = lambda name, number: ""
    version, _ = fetched(sources, join(server.url, "a.tar"), size=20_000)
    assert version.size == len(CONTENT)
    assert fetched(sources, join(server.url, "empty"), size=5)[0].size == 0
    assert len(server.requests) == 4


def test_a_file_that_changes_while_it_is_read_is_read_anew(server: FaultyServer) -> None:
    other = bytes(reversed(CONTENT))

    def change(name: str, number: int) -> str:
        if number == 3:
            server.files = {"a.tar": other}
        return ""

    server.fault = change
    assert fetched(quick(connections=1), join(server.url, "a.tar"))[1] == other


def test_a_resumed_read_never_joins_two_contents(server: FaultyServer) -> None:
    other = bytes(reversed(CONTENT))

    def change(name: str, number: int) -> str:
        if number == 1:
            server.files = {"a.tar": other}
        return "drop" if number == 0 else ""

    server.fault = change
    assert quick(part=20_000).read(join(server.url, "a.tar")) == other


def test_a_known_version_tells_a_changed_file(server: FaultyServer) -> None:
    sources, url = quick(), join(server.url, "a.tar")
    version, _ = fetched(sources, url)
    server.files = {"a.tar": bytes(reversed(CONTENT))}
    with pytest.raises(ChangedError):
        sources.read_range(url, 100, 200, version)
    server.files = {"a.tar": CONTENT[:50]}
    with pytest.raises(ChangedError):
        sources.read_range(url, 100, 200, version)


def test_a_file_that_keeps_changing_ends_in_an_error(server: FaultyServer) -> None:
    def change(name: str, number: int) -> str:
        server.files = {"a.tar": number.to_bytes(4, "big") + CONTENT[4:]}
        return ""

    server.fault = change
    with pytest.raises(TransientError, match="changed in each of 4 reads"):
        fetched(quick(connections=1), join(server.url, "a.tar"))


def test_secrets_stay_out_of_messages(
    server: FaultyServer, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fault = lambda name, number: "500" if number < 2 else "403"
    url = join(server.url.replace("//", "//anna:pass%20word@") + "?sig=hidden", "a.tar")
    assert url.endswith("/set/a.tar?sig=hidden")
    with caplog.at_level(logging.DEBUG, "pipelines"), pytest.raises(DataError) as raised:
        quick().read(url)
    text = caplog.text + str(raised.value) + shown(url)
    assert "a.tar" in text and not any(secret in text for secret in ("anna", "pass", "hidden"))
    assert server.headers[0]["authorization"] == "Basic YW5uYTpwYXNzIHdvcmQ="
    with pytest.raises(TransientError) as lost:  # nobody listens: the client's own message holds the address
        quick(tries=1).read("http://anna:word@127.0.0.1:9/a.tar?sig=hidden")
    assert not any(secret in str(lost.value) for secret in ("anna", "word", "hidden"))


def test_credentials_come_from_netrc(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login anna password word\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    from pipelines.sources import http

    http._of_netrc.cache_clear()
    quick().read(join(server.url, "a.tar"))
    http._of_netrc.cache_clear()
    assert server.headers[-1]["authorization"] == "Basic YW5uYTp3b3Jk"


def test_commands_run_only_where_they_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "it's a.tar").write_bytes(CONTENT)
    url = join(f"pipe:cat {tmp_path}/{{name}}", "it's a.tar")
    with pytest.raises(DataError, match=r"pipe:cat .*allow_pipe: true"):
        quick().read(url)
    sources = quick(allow_pipe=True, tries=2, timeout=5)
    assert sources.read(url) == CONTENT
    version, content = fetched(sources, url)
    assert content == CONTENT
    assert sources.read_range(url, 10, 20, version) == CONTENT[10:20]
    with pytest.raises(TransientError, match="ended with 3"):
        sources.read("pipe:exit 3")
    start = time.monotonic()
    with pytest.raises(TransientError, match="limit"):
        quick(allow_pipe=True, tries=1, timeout=0.2).read("pipe:sleep 60 | sleep 60")
    assert time.monotonic() - start < 30


def test_local_files_and_unknown_schemes(tmp_path: Path) -> None:
    (tmp_path / "a b").write_bytes(CONTENT)
    for folder in (str(tmp_path), tmp_path.as_uri()):
        assert local_path(join(folder, "a b")) == tmp_path / "a b"
        assert fetched(quick(), join(folder, "a b"))[1] == CONTENT
        with pytest.raises(AbsentError):
            quick().read(join(folder, "c"))
    assert local_path("s3://bucket/a") is local_path("https://host/a") is local_path("pipe:cat a") is None
    with pytest.raises(DataError, match="ftp:// cannot be read"):
        quick().read("ftp://host/a")
    for change in ({"tries": 0}, {"part": 0}, {"connections": 0}, {"timeout": 0}, {"first_delay": -1}):
        with pytest.raises(ValueError, match="positive"):
            quick(**change)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real S3 server with a bucket `data`."""
    import boto3

    with s3_server("data") as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.client("s3").put_object(Bucket="data", Key="deep/a.tar", Body=CONTENT)
        yield "s3://data/deep"


def test_s3_is_read_by_ranges(s3: str) -> None:
    import boto3

    sources = quick(timeout=10)
    url = join(s3, "a.tar")
    assert sources.read(url) == CONTENT
    version, content = fetched(sources, url)
    assert content == CONTENT and version.size == len(CONTENT)
    assert sources.read_range(url, 4000, 9000, version) == CONTENT[4000:9000]
    with pytest.raises(AbsentError):
        sources.read(join(s3, "b.tar"))
    with pytest.raises(AbsentError):
        sources.read("s3://nobody/a.tar")
    boto3.client("s3", region_name="us-east-1").put_object(Bucket="data", Key="deep/a.tar", Body=CONTENT[:9500])
    with pytest.raises(ChangedError):
        sources.read_range(url, 4000, 9000, version)


def test_s3_that_does_not_answer_ends_in_an_error(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match=r"s3://data/deep/a\.tar: could not be read in 2 tries"):
        quick(tries=2, timeout=1).read(join(s3, "a.tar"))


# --- Google Cloud Storage ------------------------------------------------------------------------------------------


@pytest.fixture
def google(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> FaultyServer:
    """The server as an emulator."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url.removesuffix("/set"))
    return server


def test_a_bucket_of_google_is_read_by_ranges(google: FaultyServer) -> None:
    google.fault = lambda name, number: ["503", "drop", ""][min(number, 2)]
    sources = quick()
    version, content = fetched(sources, "gs://bucket/some set/a.tar")
    assert content == CONTENT and version.size == len(CONTENT) and version.tag and version.ranges
    google.fault = lambda name, number: ""
    assert sources.read_range("gs://bucket/some set/a.tar", 77, 5000, version) == CONTENT[77:5000]
    google.files["a.tar"] = CONTENT[::-1]
    with pytest.raises(ChangedError):
        sources.read_range("gs://bucket/some set/a.tar", 77, 5000, version)
    with pytest.raises(AbsentError, match="not there"):
        sources.read("gs://bucket/b.tar")
    google.fault = lambda name, number: "403"
    with pytest.raises(DataError, match="HTTP 403; check the address and the right to read it"):
        sources.read("gs://bucket/a.tar")


def test_what_google_is_asked_is_signed(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By application default credentials, which are refreshed once; a public bucket needs none."""
    import google.auth
    from google.oauth2.credentials import Credentials

    from pipelines.sources import reading

    class Refreshing(Credentials):
        refreshed = 0

        def refresh(self, request: object) -> None:
            self.refreshed += 1
            self.token = "secret"

    asked: list[tuple[str, str | None]] = []

    class Recording(reading.Http):
        def open(self, url, first, last, known, signed=None):  # type: ignore[no-untyped-def]
            asked.append((url, (signed or {}).get("authorization")))
            return super().open(join(server.url, "a.tar"), first, last, known, {})

    credentials = Refreshing(None)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(reading, "Http", Recording)
    monkeypatch.setattr(google.auth, "default", lambda scopes: (credentials, "project"))
    assert fetched(quick(), "gs://bucket/some set/a.tar")[1] == CONTENT
    assert set(asked) == {("https://storage.googleapis.com/bucket/some%20set/a.tar", "Bearer secret")}
    assert credentials.refreshed == 1

    def nobody(scopes: object) -> None:
        raise google.auth.exceptions.DefaultCredentialsError("none")

    monkeypatch.setattr(google.auth, "default", nobody)
    asked.clear()
    assert quick().read("gs://bucket/a.tar") == CONTENT and asked[0][1] is None
