"""The HTTP service on a real socket, the model in this process instead of behind Ray."""

import asyncio
import base64
import contextlib
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import urllib3
from PIL import Image
from served import SIDE, photo
from test_images import bomb, encoded

from orchestration.serving.answers import Answer, Work, answered
from orchestration.serving.app import Terms, UnavailableError, application
from orchestration.serving.finder import Finder
from orchestration.serving.found import Found
from orchestration.serving.images import Limits, Pixels
from orchestration.serving.service import bound, http_server

TOKEN = "0123456789abcdef-secret"
LIMITS = Limits(bytes=60_000, pixels=5000, images=3)


@dataclass
class Local:
    """Answers in this process; slowly, or not at all, where a test asks for it."""

    finder: Finder
    limits: Limits
    seconds: float = 0.0
    error: Exception | None = None
    alive: int = 1
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))

    async def answer(self, work: Work) -> Answer:
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error

        async def find(image: Pixels) -> Found:
            return self.finder.find(image[None])[0]

        return await answered(
            work, model="models:/m/1", side=self.finder.side, limits=self.limits, find=find, pool=self.pool
        )

    async def replicas(self) -> int:
        return self.alive


class Client:
    def __init__(self, port: int) -> None:
        self.port = port
        self.pool = urllib3.HTTPConnectionPool("127.0.0.1", port, maxsize=16, retries=False, timeout=30)

    def get(self, path: str, **headers: str) -> urllib3.BaseHTTPResponse:
        return self.pool.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, media: str = "image/png", **headers: str) -> urllib3.BaseHTTPResponse:
        return self.pool.request("POST", path, body=body, headers={"Content-Type": media, **headers})

    def ask(self, path: str, body: Any) -> Any:
        """JSON in, JSON out."""
        answer = self.post(path, json.dumps(body), "application/json")
        assert answer.status == 200, answer.data
        return answer.json()


@contextmanager
def serving(backend: Local, **terms: Any) -> Iterator[Client]:
    app = application(backend, Terms(backend.limits, **terms), {"model": "models:/m/1"})
    with bound("127.0.0.1", 0) as listener:
        server = http_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Client(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def backend(finder: Finder) -> Local:
    return Local(finder, LIMITS)


@pytest.fixture
def client(backend: Local) -> Iterator[Client]:
    with serving(backend) as client:
        yield client


def sentence(answer: urllib3.BaseHTTPResponse, status: int) -> str:
    assert answer.status == status, answer.data
    return str(answer.json()["error"])


def test_an_image_gets_what_the_model_finds(client: Client, finder: Finder) -> None:
    image = photo(1)
    (expected,) = finder.find(image[None])
    answer = client.post("/predict", encoded(image)).json()
    assert answer["model"] == "models:/m/1"
    (told,) = answer["images"]
    assert told.pop("masks") == expected.run_lengths()
    assert told == {"box": [0, 0, SIDE, SIDE], **expected.facts()}

    picture = client.post("/predict/labels.png", encoded(image))
    assert picture.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(picture.data))), expected.labels())
    drawn = client.post("/predict/overlay.png", encoded(image))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(drawn.data))), expected.overlay())


def test_arrays_base64_and_bytes_say_the_same(client: Client) -> None:
    images = [photo(number) for number in range(3)]
    bare = [client.post("/predict", encoded(image)).json()["images"][0] for image in images]
    assert client.ask("/predict", {"inputs": np.stack(images).tolist()})["images"] == bare
    texts = [base64.b64encode(encoded(image)).decode() for image in images]
    assert client.ask("/predict", {"images": texts})["images"] == bare


def test_masks_come_as_they_are_asked_for(client: Client, finder: Finder) -> None:
    (labels,) = [found.labels() for found in finder.find(photo(1)[None])]
    (told,) = client.post("/predict?masks=png", encoded(photo(1))).json()["images"]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(told["labels"])))), labels)
    (told,) = client.post("/predict?masks=none", encoded(photo(1))).json()["images"]
    assert not {"masks", "labels"} & told.keys()
    assert "masks: svg is not one of rle, png, none" in sentence(client.post("/predict?masks=svg", b""), 400)


def test_photos_are_cut_to_the_square_in_the_middle(client: Client) -> None:
    (told,) = client.post("/predict", encoded(photo(1, 40, 100), "JPEG"), "image/jpeg").json()["images"]
    assert told["box"] == [30, 0, 70, 40]


@pytest.mark.parametrize(
    ("media", "body", "status", "told"),
    [
        ("image/png", b"no image", 400, "neither a PNG nor a JPEG"),
        ("image/png", b"", 400, "neither a PNG nor a JPEG"),
        ("image/jpeg", encoded(photo(1), "JPEG")[:200], 400, "cannot be decoded"),
        ("image/png", bomb(100, 51), 413, "100x51 is over the limit of 5000 pixels"),
        ("image/png", bomb(30_000, 30_000), 413, "its size is over the limit of 5000 pixels"),
        ("image/png", bytes(60_001), 413, "over the limit of 60000 bytes"),
        ("application/json", b"{", 400, "not JSON"),
        ("application/json", b"[" * 20_000, 400, "not JSON"),
        ("application/json", b"[1]", 400, "give {"),
        ("application/json", b'{"inputs": [], "images": []}', 400, "give {"),
        ("application/json", b'{"inputs": []}', 400, "inputs: no image in it"),
        ("application/json", b'{"inputs": [[[1, 2]]]}', 400, "inputs: int64 [1, 1, 2]; give whole numbers"),
        ("application/json", b'{"inputs": [[[[1, 2, 300]]]]}', 400, "give 0 to 255"),
        ("application/json", b'{"images": ["%%%"]}', 400, "images[0]: "),
        ("application/json", b'{"images": [7]}', 400, "images[0]: neither"),
        ("application/json", b'{"images": ["", "", "", ""]}', 413, "images: 4 images are over the limit of 3"),
        ("text/html", b"<html>", 415, "text/html is not taken; send image/png"),
        ("", b"", 415, "none is not taken"),
    ],
    ids=str.split(
        "text none cut one-row bomb long cut-json deep list two-names empty flat over text number many html no-type"
    ),
)
def test_bad_input_is_told_what_is_wrong(client: Client, media: str, body: bytes, status: int, told: str) -> None:
    assert told in sentence(client.post("/predict", body, media), status)


def test_limits_count_all_images_of_a_request(client: Client) -> None:
    texts = [base64.b64encode(encoded(photo(number, 40, 50))).decode() for number in range(3)]
    assert len(client.ask("/predict?masks=none", {"images": texts[:2]})["images"]) == 2
    answer = client.post("/predict", json.dumps({"images": texts}), "application/json")
    assert "images[2]: 50x40 is over the limit of 1000 pixels" in sentence(answer, 413)
    arrays = json.dumps({"inputs": np.zeros((2, 51, 50, 3), int).tolist()})
    assert "5100 pixels are over the limit" in sentence(client.post("/predict", arrays, "application/json"), 413)
    answer = client.post("/predict/labels.png", json.dumps({"images": texts[:2]}), "application/json")
    assert "a picture is of one image" in sentence(answer, 400)


def test_an_endless_body_is_cut_off_at_the_limit(client: Client) -> None:
    """Without a Content-Length, in chunks, for as long as the server listens."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as sent:
        head = (
            "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        sent.sendall(head.encode())
        for _ in range(8):
            sent.sendall(b"2000\r\n" + bytes(0x2000) + b"\r\n")
        assert sent.recv(4096).startswith(b"HTTP/1.1 413")


def test_an_endless_head_is_cut_off(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as sent:
        sent.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\n")
        with contextlib.suppress(ConnectionError):  # it hangs up while this is sent
            for number in range(1000):
                sent.sendall(b"X-%d: " % number + bytes([65]) * 1000 + b"\r\n")
            assert sent.recv(4096).startswith(b"HTTP/1.1 400")


def test_a_slow_body_is_given_up(backend: Local) -> None:
    with (
        serving(backend, seconds=0.2) as client,
        socket.create_connection(("127.0.0.1", client.port), timeout=30) as sent,
    ):
        head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 100\r\n\r\n"
        sent.sendall(head.encode() + b"half")
        assert sent.recv(4096).startswith(b"HTTP/1.1 504")
        assert "slotforge_requests_waiting 0.0" in client.get("/metrics").data.decode()


def test_paths_and_methods(client: Client) -> None:
    assert client.get("/nothing").status == 404
    assert client.get("/predict").status == 405
    about = client.get("/").json()
    assert about["model"] == "models:/m/1" and about["limits"]["bytes"] == LIMITS.bytes


def test_the_token_is_demanded_everywhere_but_for_health(backend: Local, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(backend, token=TOKEN) as client:
        for headers in (
            {},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer é"},
        ):
            for answer in (client.get("/", **headers), client.get("/metrics", **headers)):
                assert "demands its token" in sentence(answer, 401)
                assert answer.headers["www-authenticate"] == "Bearer"
            assert client.post("/predict", encoded(photo(1)), **headers).status == 401
            assert client.get("/nothing", **headers).status == 401
        right = {"Authorization": f"bearer {TOKEN}"}
        assert client.post("/predict", encoded(photo(1)), **right).status == 200
        assert client.get("/metrics", **right, Host="example.org").status == 200
        assert client.get("/healthz").status == 200
    assert TOKEN not in caplog.text and TOKEN not in repr(Terms(token=TOKEN))


def test_without_a_token_only_names_of_this_machine_are_answered(client: Client) -> None:
    for name in ("localhost", f"127.0.0.1:{client.port}", "[::1]:80", "LOCALHOST"):
        assert client.get("/", Host=name).status == 200
    for name in ("example.org", "127.0.0.1.example.org", "", f"example.org:{client.port}"):
        assert "not a name of this machine" in sentence(client.get("/", Host=name), 403)


def test_a_full_queue_sends_away_and_says_when_to_come_back(backend: Local) -> None:
    backend.seconds = 0.5
    with serving(backend, waiting=2) as client, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: client.post("/predict?masks=none", encoded(photo(1))), range(6)))
        statuses = sorted(answer.status for answer in answers)
        assert statuses[:2] == [200, 200] and set(statuses[2:]) == {503}
        refused = next(answer for answer in answers if answer.status == 503)
        assert int(refused.headers["retry-after"]) >= 1
        backend.seconds = 0
        assert client.post("/predict", encoded(photo(1))).status == 200  # there is room again


def test_what_fails_inside_is_not_told_outside(backend: Local, caplog: pytest.LogCaptureFixture) -> None:
    with serving(backend, seconds=0.3) as client:
        backend.error = RuntimeError("a path of this machine")
        assert "its log says how" in sentence(client.post("/predict", encoded(photo(1))), 500)
        assert "a path of this machine" in caplog.text
        backend.error = UnavailableError("no replica")
        answer = client.post("/predict", encoded(photo(1)))
        assert sentence(answer, 503) == "no replica" and "retry-after" in answer.headers
        backend.error, backend.seconds = None, 5
        start = time.monotonic()
        assert "within 0.3 s" in sentence(client.post("/predict", encoded(photo(1))), 504)
        assert time.monotonic() - start < 5
        backend.alive = 0
        assert client.get("/healthz").status == 503


def test_metrics_count_what_was_answered(client: Client) -> None:
    for _ in range(3):
        client.post("/predict", encoded(photo(1)))
    client.post("/predict", b"no image")
    client.ask("/predict", {"inputs": np.stack([photo(1), photo(2)]).tolist()})
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").data.decode().splitlines() if line[0] != "#")
    assert float(lines['slotforge_requests_total{path="/predict",status="200"}']) == 4
    assert float(lines['slotforge_requests_total{path="/predict",status="400"}']) == 1
    assert float(lines["slotforge_images_total"]) == 5
    assert float(lines["slotforge_request_seconds_count"]) == 5
    assert float(lines["slotforge_replicas"]) == 1
    assert float(lines["process_resident_memory_bytes"]) > 0
