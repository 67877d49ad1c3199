"""Promotions by processes that race, are killed and are frozen, over sqlite and over a real MLflow server."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import made_up
import pytest

from orchestration.registry import promote as promotion
from orchestration.registry.lock import PromotionLock
from orchestration.registry.promote import moved_by_hand

pytestmark = pytest.mark.slow
PATIENCE = 240
SECONDS = 12.0  # without a sign of life, for a lock in these tests

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["made_up"])


@pytest.fixture(scope="module", params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    if request.param == "sqlite":
        made_up.of(store, "").client.search_registered_models()  # makes the tables, once
        yield store
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).with_name("mlflow"))
    command = [program, "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([*command, "--workers", "1"], start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_of_several_at_once_each_replaces_another(uri: str) -> None:
    made = made_up.new(made_up.of(uri, "").client, "raced")
    old = made.add(0.5)
    made.promote(old)
    candidates = [made.add(0.6 + 0.05 * number) for number in range(4)]
    together = forkserver.Barrier(len(candidates))
    racers = [forkserver.Process(target=made_up.race, args=(uri, "raced", c, together)) for c in candidates]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(PATIENCE)
    assert [racer.exitcode for racer in racers] == [0] * len(racers)
    decisions = {version: made.client.get_model_version("raced", version).tags for version in candidates}
    assert all("gate" in tags for tags in decisions.values())
    replaced: dict[str, str] = {}
    for version, tags in decisions.items():
        told = json.loads(tags["gate.decision"])
        if told["passed"]:
            assert told["champion"] not in replaced, "two replaced the same champion"
            replaced[told["champion"]] = version
    chain = [old]
    while chain[-1] in replaced:
        chain.append(replaced[chain[-1]])
    assert len(chain) == len(replaced) + 1
    assert made.aliases() == (chain[-1], chain[-2])
    assert chain[-1] == candidates[-1]  # the best wins, whoever comes first
    assert moved_by_hand(made.client, "raced") is None
    assert made.client.search_model_versions("name = 'raced.promotions'") == []


@pytest.mark.parametrize("survived", [0, 1])
def test_a_killed_promotion_is_told_and_the_next_one_decides(
    uri: str, survived: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"killed-{survived}"
    made = made_up.new(made_up.of(uri, "").client, name)
    first, second = made.add(0.5), made.add(0.9)
    made.promote(first)
    victim = forkserver.Process(target=made_up.die_at_alias, args=(uri, name, second, survived))
    victim.start()
    victim.join(PATIENCE)
    assert victim.exitcode == -signal.SIGKILL
    assert made.aliases()[0] == first
    assert "champion is version 1, the last decision says version 2" in str(moved_by_hand(made.client, name))
    assert len(made.client.search_model_versions(f"name = '{name}.promotions'")) == 1  # its ticket

    monkeypatch.setattr(promotion, "PromotionLock", made_up.impatient(SECONDS))
    began = time.monotonic()
    assert made.promote(second).champion
    assert time.monotonic() - began >= SECONDS
    assert made.aliases() == (second, first)
    assert moved_by_hand(made.client, name) is None


def test_a_frozen_promotion_moves_nothing_once_it_was_taken_for_dead(uri: str) -> None:
    made = made_up.new(made_up.of(uri, "").client, "frozen")
    said, go_on = forkserver.Queue(), forkserver.Event()
    holder = forkserver.Process(target=made_up.hold, args=(uri, "frozen", SECONDS, said, go_on))
    holder.start()
    try:
        assert said.get(timeout=PATIENCE) == "holds"
        os.kill(holder.pid or 0, signal.SIGSTOP)
        with PromotionLock(made.client, "frozen", SECONDS) as lock:
            lock.check()
            os.kill(holder.pid or 0, signal.SIGCONT)
            go_on.set()
            assert "nothing was moved" in said.get(timeout=PATIENCE)
        holder.join(PATIENCE)
        assert holder.exitcode == 0
    finally:
        holder.kill()
