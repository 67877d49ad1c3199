"""A trained and registered model at work: HTTP on real Ray Serve, sets on real Ray Data, and MLflow's own server."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import urllib3
from PIL import Image
from runs import PATIENCE, Run, kill_everything, wait

from orchestration.kept_memory import keeping_memory
from orchestration.registry.loading import load
from orchestration.serving.finder import Finder, ModelName
from orchestration.serving.parts import claim, left_of
from orchestration.serving.predict_sets import Predictor, read_parts
from orchestration.serving.sources import ShardSource
from pipelines import write_index, write_shard

SIDE = 15
CLIENTS = 4

pytestmark = pytest.mark.slow


def image(number: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    random = np.random.Generator(np.random.Philox(key=[number, 11]))
    return random.integers(0, 256, (5, 5, 3), dtype=np.uint8).repeat(3, axis=0).repeat(3, axis=1)


def png(pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def finder(twin: tuple[Run, str]) -> Finder:
    return Finder(load("models:/slotforge-twin@champion", twin[0].uri))


def slotforge(run: Run, *words: str) -> "subprocess.Popen[str]":
    named = ("--model", "models:/slotforge-twin@champion", "--tracking-uri", run.uri)
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("slotforge")), *words, *named],
        env=run.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def actors(command: "subprocess.Popen[str]", name: str) -> list[psutil.Process]:
    """Ray's processes under a command that hold such an actor."""
    family = psutil.Process(command.pid).children(recursive=True)
    return [child for child in family if name in " ".join(_command(child))]


def keep_their_memory(processes: list[psutil.Process]) -> bool:
    return bool(processes) and all(keeping_memory({}).items() <= process.environ().items() for process in processes)


class Service:
    """slotforge serve, with what it prints."""

    def __init__(self, run: Run, *words: str) -> None:
        self.process = slotforge(run, "serve", "--port", "0", *words)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait(lambda: "answers at" in self.output or self.process.poll() is not None)
        found = re.search(r"answers at http://127\.0\.0\.1:(\d+)/predict", self.output)
        assert found, self.output
        self.port = int(found[1])
        self.pool = urllib3.HTTPConnectionPool("127.0.0.1", self.port, maxsize=CLIENTS, retries=False, timeout=PATIENCE)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def replicas(self) -> list[psutil.Process]:
        return actors(self.process, "ServeReplica")

    def ask(self, body: bytes, path: str = "/predict", **headers: str) -> urllib3.BaseHTTPResponse:
        return self.pool.request("POST", path, body=body, headers={"Content-Type": "image/png", **headers})

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)


@contextmanager
def serving(run: Run, *words: str) -> Iterator[Service]:
    service = Service(run, *words)
    try:
        yield service
    finally:
        if service.process.poll() is None:
            kill_everything(service.process)


def test_requests_go_on_while_a_replica_dies(twin: tuple[Run, str], finder: Finder, tmp_path: Path) -> None:
    run, _ = twin
    images = [image(number) for number in range(24)]
    expected = [json.loads(json.dumps(found.facts())) for found in finder.find(np.stack(images))]
    (tmp_path / "token").write_text("a-token-of-this-test-alone")
    right = {"Authorization": "Bearer a-token-of-this-test-alone"}
    answered: list[int] = [0] * CLIENTS
    wrong: list[Any] = []
    ended = threading.Event()

    with serving(run, "--replicas", "2", "--batch", "8", "--token-file", str(tmp_path / "token")) as service:
        family = psutil.Process(service.process.pid).children(recursive=True)

        def client(which: int) -> None:
            number = which
            while not ended.is_set():
                number = (number + CLIENTS) % len(images)
                try:
                    answer = service.ask(png(images[number]), "/predict?masks=none", **right)
                    told = answer.json()
                except (urllib3.exceptions.HTTPError, ValueError) as error:
                    wrong.append(repr(error))
                    return
                if answer.status == 200:
                    (facts,) = told["images"]
                    assert facts.pop("box") == [0, 0, SIDE, SIDE]
                    near = np.allclose(facts.pop("mask_share"), expected[number]["mask_share"], atol=1e-4)
                    near &= np.allclose(facts.pop("keep_probability"), expected[number]["keep_probability"], atol=1e-4)
                    told = "as expected" if near and facts.items() <= expected[number].items() else told
                if answer.status != 200 or told != "as expected":
                    wrong.append((answer.status, told))
                    return
                answered[which] += 1

        clients = [threading.Thread(target=client, args=(which,)) for which in range(CLIENTS)]
        for thread in clients:
            thread.start()
        try:
            wait(lambda: min(answered) >= 10 or bool(wrong))
            before = service.replicas()
            assert len(before) == 2
            assert keep_their_memory(before)
            before[0].kill()
            asked = sum(answered)
            wait(lambda: sum(answered) >= asked + 100 or bool(wrong))
            wait(lambda: len({child.pid for child in service.replicas()} - {child.pid for child in before}) >= 1)
            wait(lambda: b"slotforge_replicas 2.0" in service.pool.request("GET", "/metrics", headers=right).data)
            asked = sum(answered)
            wait(lambda: sum(answered) >= asked + 100 or bool(wrong))
        finally:
            ended.set()
            for thread in clients:
                thread.join(PATIENCE)
        assert wrong == []

        assert service.ask(png(images[0])).status == 401
        assert service.ask(b"no image", **right).status == 400
        listens = [at.laddr.ip for at in psutil.net_connections("tcp") if at.laddr and at.laddr.port == service.port]
        assert set(listens) == {"127.0.0.1"}
        family += psutil.Process(service.process.pid).children(recursive=True)
        assert service.stop() == 0, service.output
        assert service.output.rstrip().endswith("stopped")
        assert "a-token-of-this-test-alone" not in service.output
        _, alive = psutil.wait_procs(family, timeout=PATIENCE)
        assert alive == []


def test_a_killed_prediction_of_a_set_goes_on(twin: tuple[Run, str], tmp_path: Path) -> None:
    run, _ = twin
    encoded = [png(image(number)) for number in range(200)]
    shards = [
        write_shard(
            tmp_path / "set",
            f"{shard:03d}.tar",
            [{"__key__": f"{shard:03d}{number:04d}", "image.png": data} for number, data in enumerate(encoded)],
        )
        for shard in range(20)
    ]
    write_index(tmp_path / "set", shards, {})
    # Unbroken, and without Ray.
    source = ShardSource(str(tmp_path / "set"))
    model = ModelName("models:/slotforge-twin@champion", run.uri).pinned()
    claim(tmp_path / "unbroken", source, model.uri)
    predictor = Predictor(model, tmp_path / "unbroken")
    for parts in left_of(source, tmp_path / "unbroken").missing:
        for table in read_parts(source, parts, SIDE):
            predictor(table)

    def start(workers: str) -> "subprocess.Popen[str]":
        return slotforge(run, "predict", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--workers", workers)

    def written() -> int:
        return len(list((tmp_path / "out").glob("*.jsonl")))

    killed = start("2")
    wait(lambda: written() >= 2 or killed.poll() is not None)
    assert killed.poll() is None, killed.communicate()[0]
    assert keep_their_memory(actors(killed, "Predictor"))
    kill_everything(killed)
    there = written()
    assert 2 <= there < 20
    code, output = run.finish(start("1"))
    assert code == 0, output
    assert f"{4000 - 200 * there} images in" in output and f"{200 * there} there before, 0 failed" in output
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / out).iterdir() if path.name[0] != "."}
        for out in ("unbroken", "out")
    ]
    assert files[0] == files[1]


def test_mlflow_serves_the_same_model(twin: tuple[Run, str], tmp_path: Path) -> None:
    run, _ = twin
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    programs = Path(sys.executable).parent  # MLflow looks for uvicorn in the path, as an activated environment has it
    command = [str(programs / "mlflow"), "models", "serve", "--env-manager", "local"]
    path = f"{programs}:{os.environ['PATH']}"
    server = subprocess.Popen(
        [*command, "-m", "models:/slotforge-twin@champion", "--host", "127.0.0.1", "--port", str(port)],
        env={**run.environment, "PATH": path, "MLFLOW_TRACKING_URI": run.uri},
        stdout=(tmp_path / "log").open("w"),
        text=True,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    pool = urllib3.HTTPConnectionPool("127.0.0.1", port, retries=False, timeout=PATIENCE)

    def ready() -> bool:
        assert server.poll() is None, (tmp_path / "log").read_text()
        try:
            return bool(pool.request("GET", "/ping").status == 200)
        except urllib3.exceptions.HTTPError:
            return False

    def ask(images: Any) -> urllib3.BaseHTTPResponse:
        headers = {"Content-Type": "application/json"}
        return pool.request("POST", "/invocations", body=json.dumps({"inputs": images.tolist()}), headers=headers)

    try:
        wait(ready)
        images = np.stack([image(number) for number in range(3)])
        expected = load("models:/slotforge-twin@champion", run.uri).predict(None, images)
        answer = ask(images)
        assert answer.status == 200, answer.data
        told = answer.json()["predictions"]
        assert told.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(np.asarray(told[name], values.dtype), values, atol=1e-5, err_msg=name)
        for wrong in (images[0], images[..., :2]):
            assert ask(wrong).status == 400
    finally:
        if server.poll() is None:
            kill_everything(server)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
