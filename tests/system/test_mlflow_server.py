"""Every point once on a real MLflow server, whose driver is killed with -9 while it sends."""

import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from runs import PATIENCE, RECIPE, Run, kill_everything, wait
from servers import mlflow_server

BATCH = "/api/2.0/mlflow/runs/log-batch"
STEPS = RECIPE["train"]["steps"]


class Line:
    """What stands between driver and server, and may cut them off."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.batches = 0
        self.cut: tuple[int, float] | None = None  # which batch, and how much of it arrives
        self.down = False
        self.reached, self.over = threading.Event(), threading.Event()

    def disturb(self, batch: int, arrives: float) -> None:
        """From now on, after so many batches of points."""
        self.batches, self.cut = 0, (batch, arrives)
        self.reached.clear()
        self.over.clear()

    def forward(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        if self.down:
            handler.send_error(503)
            return
        if handler.path == BATCH and any(point["key"] == "loss/total" for point in json.loads(body).get("metrics", [])):
            self.batches += 1
            if self.cut is not None and self.batches == self.cut[0]:
                fields = json.loads(body)
                arrived = round(self.cut[1] * len(fields["metrics"]))
                self.cut = None
                self._send(handler, json.dumps(fields | {"metrics": fields["metrics"][:arrived]}).encode())
                self.reached.set()
                self.over.wait(PATIENCE)  # no answer: the driver dies without one
                return
        status, headers, content = self._send(handler, body)
        handler.send_response(status)
        for name, value in headers.items():
            if name.lower() in ("content-type", "content-disposition"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _send(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, Any, bytes]:
        headers = {
            k: v for k, v in handler.headers.items() if k.lower() not in ("host", "content-length", "connection")
        }
        request = urllib.request.Request(
            self.server + handler.path, data=body or None, headers=headers, method=handler.command
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with mlflow_server(tmp_path) as address:
        yield address


@pytest.fixture
def line(server: str) -> Iterator[tuple[Line, str]]:
    """A line to it, and its own address."""
    line = Line(server)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            line.forward(self)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        proxy.daemon_threads = True
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        yield line, f"http://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()


@dataclass
class ServedRun(Run):
    """Read back from the server itself."""

    server: str = ""

    @property
    def uri(self) -> str:
        return self.server


def killed_while_it_sends(run: Run, line: Line, batch: int, arrives: float) -> None:
    """A driver that dies in the middle of a batch of which a part arrives."""
    line.disturb(batch, arrives)
    driver = run.start()
    wait(lambda: line.reached.is_set() or driver.poll() is not None)
    assert driver.poll() is None, driver.communicate()[0]
    kill_everything(driver)
    line.over.set()
    assert run.newest_step() < STEPS, "the kill came too late to test anything"


@pytest.mark.slow
def test_a_driver_killed_while_it_sends_leaves_every_point_once(
    twin: tuple[Run, str], server: str, line: tuple[Line, str]
) -> None:
    undisturbed, _ = twin
    between, address = line
    run = ServedRun(undisturbed.home, "served", (f"tracking.uri={address}",), server=server)
    killed_while_it_sends(run, between, batch=2, arrives=0.4)
    killed_while_it_sends(run, between, batch=3, arrives=1.0)

    # An outage of some seconds; then to the end.
    between.cut, between.down = None, True
    driver = run.start()
    begun = run.newest_step()
    run.wait_for_step(begun + 60, driver)
    between.down = False
    code, output = run.finish(driver)
    assert code == 0, output
    assert "MLflow does not take everything now" in output and "MLflow takes everything again" in output

    client, run_id = run.client, run.run_id
    names = client.get_run(run_id).data.metrics
    for name in names:
        steps = Counter(point.step for point in client.get_metric_history(run_id, name))
        assert set(steps.values()) == {1}, name
        if name.startswith(("time/", "throughput/", "loss/", "train/")):
            assert sorted(steps) == list(range(10, STEPS + 1, 10)), name
    ours, theirs = run.curves(), undisturbed.curves()
    assert ours == theirs

    # The rest of its page.
    path = client.download_artifacts(run_id, "events.jsonl", str(undisturbed.home))
    events = [json.loads(event) for event in Path(path).read_text().splitlines()]
    kinds = Counter(event["kind"] for event in events)
    assert kinds["start"] == 3 and kinds["end"] == 1
    assert (events[-1]["kind"], events[-1]["step"]) == ("end", STEPS)
    tags = client.get_run(run_id).data.tags
    assert tags["slotforge.drivers"] == "3" and tags["slotforge.warnings"] == str(kinds["warning"])
    pictures = [entry.path for entry in client.list_artifacts(run_id, "images") if entry.path.endswith(".png")]
    taken = Counter(re.findall(r"images/(\w+)\+step\+(\d+)\+", " ".join(pictures)))
    assert set(taken.values()) == {1}
    assert {name for name, step in taken if step == str(STEPS)} == {"scenes", "attention", "counts"}
    links = re.findall(r"!\[\w+\]\((\S+)\)", tags["mlflow.note.content"])
    assert len(links) == 3
    for link in links:  # as a browser follows them from the run's page
        with urllib.request.urlopen(f"{server}/{link}", timeout=PATIENCE) as answer:
            assert answer.read(8) == b"\x89PNG\r\n\x1a\n", link
    children = client.search_runs([client.get_run(run_id).info.experiment_id], f"tags.mlflow.parentRunId = '{run_id}'")
    assert all("system/cpu_utilization_percentage" in child.data.metrics for child in children)

    # The recipe that was logged is the run's.
    recipe = client.download_artifacts(run_id, "recipe.yaml", str(undisturbed.home))
    shown = subprocess.run(
        [str(Path(sys.executable).parent / "slotforge"), "recipe", recipe],
        env=run.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"steps: {STEPS}" in shown.stdout
