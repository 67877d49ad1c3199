"""A cloud's notice becomes a drain, whatever the metadata service does before; against doubles of both services."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from orchestration.clusters import spot
from orchestration.clusters.spot import AwsNotices, GcpNotices, MetadataError, Raylet, find_raylet, watch


class Service(ThreadingHTTPServer):
    """What AWS's IMDSv2 and GCP's metadata server answer, by their documentation."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.tokens: list[str] = []
        self.notice: str | None = None  # AWS: the body of an instance-action
        self.preempted = "FALSE"
        self.broken = 0  # questions that get no sensible answer

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self) -> None:
        lasting = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        if self.path != "/latest/api/token" or not lasting or not 1 <= int(lasting) <= 21_600:
            return self.say(400, "")
        self.server.tokens.append(f"token-{len(self.server.tokens)}")
        return self.say(200, self.server.tokens[-1])

    def do_GET(self) -> None:
        if self.server.broken:
            self.server.broken -= 1
            return self.say(500, "try again")
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") not in self.server.tokens[-1:]:
                return self.say(401, "")
            return self.say(404, "") if self.server.notice is None else self.say(200, self.server.notice)
        if self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            return self.say(200, self.server.preempted)
        return self.say(403, "")

    def say(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{server.host}/")
        monkeypatch.setenv("GCE_METADATA_HOST", server.host)
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # such questions never leave the machine
        yield server
        server.shutdown()
        thread.join()


def instance_action(seconds: float) -> str:
    return json.dumps({"action": "terminate", "time": f"{datetime.now(UTC) + timedelta(seconds=seconds):%FT%TZ}"})


def test_aws_is_asked_with_a_token_that_is_renewed(service: Service) -> None:
    notices = AwsNotices()
    assert notices.seconds_left() is None
    assert notices.seconds_left() is None and len(service.tokens) == 1
    service.tokens.append("another")  # ours has aged
    assert notices.seconds_left() is None and len(service.tokens) == 3
    service.notice = instance_action(120)
    left = notices.seconds_left()
    assert left is not None and 117 < left <= 120


def test_gcp_gives_half_a_minute(service: Service) -> None:
    notices = GcpNotices()
    assert notices.seconds_left() is None
    service.preempted = "TRUE"
    assert notices.seconds_left() == 30


@pytest.mark.parametrize("notices", [AwsNotices, GcpNotices])
def test_an_answer_that_is_none_is_no_notice(
    service: Service, notices: Callable[[], AwsNotices | GcpNotices], monkeypatch: pytest.MonkeyPatch
) -> None:
    service.broken = 1
    with pytest.raises(MetadataError, match="500"):
        notices().seconds_left()
    service.notice, service.preempted = "<html>", "<html>"
    with pytest.raises(MetadataError, match="html"):
        notices().seconds_left()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    with pytest.raises(MetadataError, match="refused"):
        notices().seconds_left()


class Clock:
    def __init__(self, *events: Callable[[], object]) -> None:
        self.time, self.events = 0.0, list(events)

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        if self.events:
            self.events.pop(0)()

    def now(self) -> float:
        return self.time


def test_a_notice_is_passed_on_once_it_comes(service: Service) -> None:
    drained: list[float] = []
    clock = Clock(
        lambda: setattr(service, "broken", 2), lambda: None, lambda: None, lambda: setattr(service, "preempted", "TRUE")
    )
    watch(GcpNotices(), drained.append, sleep=clock.sleep, now=clock.now)
    assert drained == [30] and not clock.events


def test_a_drain_that_fails_is_tried_again_while_there_is_time(service: Service) -> None:
    service.preempted = "TRUE"
    tries: list[float] = []

    def drain(seconds: float) -> None:
        tries.append(seconds)
        if len(tries) < 3:
            raise RuntimeError("no raylet runs on this machine")

    clock = Clock()
    watch(GcpNotices(), drain, sleep=clock.sleep, now=clock.now)
    assert tries == [30, 28, 26]

    def never(seconds: float) -> None:
        raise RuntimeError("no")

    clock = Clock()
    watch(GcpNotices(), never, sleep=clock.sleep, now=clock.now)
    assert clock.time == 30


def test_the_node_is_that_of_the_raylet_here() -> None:
    raylet = ["/ray/core/src/ray/raylet/raylet", "--node_id=ab12", "--gcs-address=10.0.0.1:6379"]
    agent = ["ray::DashboardAgent", "--node-id=cd34", "--gcs-address=10.0.0.1:6379"]
    assert find_raylet([[], agent, raylet]) == Raylet("ab12", "10.0.0.1:6379")
    assert find_raylet([agent]) is None


def test_the_command_drains_with_rays_own(service: Service, tmp_path: Path) -> None:
    """The whole program, with a `ray` that tells what it was told."""
    service.notice = instance_action(120)
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    told = tmp_path / "told"
    ray = tmp_path / "bin" / "ray"
    ray.write_text(f'#!/bin/sh\necho "$@" > {told}\n')
    ray.chmod(0o755)
    code = (
        "import sys; from orchestration.clusters import spot; "
        f"sys.executable = {str(program)!r}; "
        "spot.find_raylet = lambda commands: spot.Raylet('ab12', 'head:6379'); "
        "sys.argv = ['spot', 'aws']; spot.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    words = told.read_text().split()
    assert words[:5] == ["drain-node", "--address", "head:6379", "--node-id", "ab12"]
    reason = words[words.index("--reason") + 1]
    assert DrainNodeReason.Value(reason) == DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    assert 100 < int(words[words.index("--deadline-remaining-seconds") + 1]) <= 120


def test_the_module_says_how_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-m", spot.__name__, "--help"], capture_output=True, text=True, check=True)
    assert "{aws,gcp}" in done.stdout
