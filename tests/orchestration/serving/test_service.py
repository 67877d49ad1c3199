"""Where the service may listen, and what it takes to be let in."""

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from orchestration.cli import app
from orchestration.serving import service
from orchestration.serving.finder import ModelName
from orchestration.serving.service import ServeError, bound, is_loopback, read_token

SECRET = "0123456789abcdef0123456789abcdef"


def serve(*words: object) -> Result:
    return CliRunner().invoke(app, ["serve", "--model", "models:/m/1", *(str(word) for word in words)])


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.0.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.7", False),
        ("no-such-host.invalid", False),
    ],
)
def test_what_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7"])
def test_beyond_this_machine_a_token_is_demanded(host: str) -> None:
    done = serve("--host", host, "--port", 0)
    assert done.exit_code == 2 and "demand a token with --token-file" in done.output


def test_a_token_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"  {SECRET}\n")
    assert read_token(path) == SECRET


@pytest.mark.parametrize(
    "content", [b"", b"short", b"two words are no token at all", "sécrét-sécrét-sécrét".encode(), b"\xff" * 40]
)
def test_what_is_no_token_is_refused_without_being_shown(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ServeError, match="--token-file") as caught:
        read_token(path)
    assert not content or content.decode(errors="replace") not in str(caught.value)
    done = serve("--token-file", path, "--port", 0)
    assert done.exit_code == 2 and "--token-file" in done.output
    assert "cannot be read" in serve("--token-file", tmp_path / "nowhere").output


def test_a_port_that_is_taken_is_told_before_anything_is_started() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"--port {port}: cannot listen there"):
            bound("127.0.0.1", port)
        done = serve("--port", port)
        assert done.exit_code == 2 and "name another port" in done.output


class NoReplicas:
    """Stands where Ray's would: nothing is asked of it before the address is told."""

    def __init__(self, *_: object, **__: object) -> None:
        self.count = 1

    def stop(self) -> None:
        pass


def test_who_is_told_the_address_can_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr("orchestration.serving.replicas.Replicas", NoReplicas)

    def connect(address: str, version: str) -> None:
        host, _, port = address.removeprefix("http://").rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()
        raise KeyboardInterrupt

    with bound("127.0.0.1", 0) as listener, pytest.raises(KeyboardInterrupt):
        service._serve(service.Settings(ModelName("models:/a/1", "sqlite://")), listener, connect)
