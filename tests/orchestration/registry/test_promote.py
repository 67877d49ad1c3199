"""Who becomes champion: one at a time, on the same images, with a way back, and written down. A real store."""

import json
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pytest
from made_up import MadeUp, new

from orchestration.registry import promote as module
from orchestration.registry.lock import PromotionError
from orchestration.registry.promote import (
    CHAMPION,
    PREVIOUS,
    Decision,
    decided,
    moved_by_hand,
    rollback,
)


@pytest.fixture
def registry(client: mlflow.MlflowClient, request: pytest.FixtureRequest) -> MadeUp:
    return new(client, f"model-{zlib.crc32(request.node.name.encode())}")


def decision(registry: MadeUp, version: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(registry.client.get_model_version(registry.name, version).tags["gate.decision"])
    return found


def test_promote_and_rollback_there_and_back(registry: MadeUp) -> None:
    client, name = registry.client, registry.name
    first, better, worse = registry.add(0.8), registry.add(0.9), registry.add(0.7)
    with pytest.raises(ValueError, match="it has no champion"):
        rollback(client, name)

    assert not registry.promote(worse, floors={"fg_ari": 0.75}).champion
    assert registry.aliases() == (None, None)
    assert registry.promote(first, floors={"fg_ari": 0.75}) == Decision(
        name, first, True, "the floors hold, and there is no champion yet"
    )
    assert registry.aliases() == (first, None)
    with pytest.raises(ValueError, match="there is none to go back to"):
        rollback(client, name)

    won = registry.promote(better)
    assert won.champion and won.uri == f"models:/{name}@champion"
    assert registry.aliases() == (better, first)
    lost = registry.promote(worse)
    assert not lost.champion and lost.uri == f"models:/{name}/{worse}"
    assert f"of version {better} on the same 60 images" in lost.reason
    assert registry.aliases() == (better, first)
    assert registry.promote(better).reason == "it is the champion already"
    assert moved_by_hand(client, name) is None

    assert rollback(client, name) == (first, better)
    assert registry.aliases() == (first, better)
    assert moved_by_hand(client, name) is None
    known = decided(client, name, better)
    assert known is not None
    assert not known.champion
    assert "a rollback to version 1" in known.reason
    assert rollback(client, name) == (better, first)
    assert registry.aliases() == (better, first)


def test_the_decision_is_written_on_the_version_with_all_figures(registry: MadeUp) -> None:
    client, name = registry.client, registry.name
    first, second = registry.add(0.8), registry.add(0.9)
    client.update_model_version(name, second, description="Trained by hand.")
    registry.promote(first)
    assert decided(client, name, second) is None
    reason = registry.promote(second, floors={"fg_ari": 0.5}, tolerated_loss=0.01).reason
    for _ in range(2):
        found = client.get_model_version(name, second)
        assert found.tags["gate"] == reason
        assert float(found.tags["eval.fg_ari"]) == pytest.approx(0.9, abs=1e-3)
        assert found.tags["eval.data"] == "digest of the shards"
        assert found.description.startswith("Trained by hand.")
        assert found.description.count("| fg_ari | 0.9") == 1
        assert "version 1" in found.description
        client.delete_registered_model_alias(name, CHAMPION)
        client.set_registered_model_alias(name, CHAMPION, first)
        registry.promote(second, floors={"fg_ari": 0.5}, tolerated_loss=0.01)  # said again: written once
    written = decision(registry, second)
    assert written["passed"] and written["champion"] == first and written["images"] == 60
    assert written["gate"]["tolerated_loss"] == 0.01
    assert written["comparison"]["bound"] == pytest.approx(0.1, abs=0.001)
    for role, quality in (("candidate", 0.9), ("champion", 0.8)):
        figure = written["figures"][role]["fg_ari"]
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["value"] == pytest.approx(quality, abs=1e-3)


def test_a_champion_that_comes_while_one_is_scored_is_met_too(registry: MadeUp) -> None:
    old, candidate, rival = registry.add(0.5), registry.add(0.8), registry.add(0.9)
    registry.promote(old)
    met = []

    def scored(version: str) -> None:
        met.append(version)
        if version == old:
            assert registry.promote(rival).champion  # elsewhere, at the same time

    assert not registry.promote(candidate, scored).champion
    assert met == [old, rival]
    assert registry.aliases() == (rival, old)


def test_promotions_at_once_form_a_chain(registry: MadeUp) -> None:
    """All are scored against the same champion first; each winner replaced the winner before it."""
    old = registry.add(0.5)
    registry.promote(old)
    candidates = [registry.add(0.6 + 0.05 * number) for number in range(4)]
    together = threading.Barrier(len(candidates))

    def run(version: str) -> Decision:
        waited: list[str] = []

        def scored(_: str) -> None:
            if not waited:
                waited.append(version)
                together.wait(timeout=120)

        return registry.promote(version, scored)

    with ThreadPoolExecutor(len(candidates)) as pool:
        decisions = list(pool.map(run, candidates))
    winners = [decision.version for decision in decisions if decision.champion]
    replaced = {decision(registry, version)["champion"]: version for version in winners}
    assert len(replaced) == len(winners)  # nobody was replaced twice
    chain = [old]
    while chain[-1] in replaced:
        chain.append(replaced[chain[-1]])
    assert sorted(chain[1:]) == sorted(winners)
    assert chain[-1] == candidates[-1]  # the best one wins whoever comes first
    assert registry.aliases() == (chain[-1], chain[-2])
    assert moved_by_hand(registry.client, registry.name) is None


@pytest.fixture
def by_hand(registry: MadeUp, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Somebody who moves the alias right when the lock is asked for the last time."""

    def at(version: str) -> None:
        check = module.PromotionLock.check

        def moved(lock: module.PromotionLock) -> None:
            check(lock)
            registry.client.set_registered_model_alias(registry.name, CHAMPION, version)

        monkeypatch.setattr(module.PromotionLock, "check", moved)

    return at


def test_a_hand_at_the_same_moment_is_noticed(registry: MadeUp, by_hand: Callable[[str], None]) -> None:
    first, other, candidate = registry.add(0.5), registry.add(0.6), registry.add(0.9)
    registry.promote(first)
    by_hand(other)
    with pytest.raises(PromotionError, match="somebody else moved champion to version 2"):
        registry.promote(candidate)
    assert registry.aliases() == (other, None)
    assert decided(registry.client, registry.name, candidate) is None


def test_a_hand_in_the_ui_is_told(registry: MadeUp) -> None:
    client, name = registry.client, registry.name
    first, second = registry.add(0.5), registry.add(0.9)
    with pytest.raises(ValueError, match="there is no such registered model"):
        moved_by_hand(client, "nobody")
    assert moved_by_hand(client, name) is None
    client.set_registered_model_alias(name, CHAMPION, second)
    told = moved_by_hand(client, name)
    assert told is not None
    assert "champion is version 2, the last decision says nobody" in told
    client.set_registered_model_alias(name, CHAMPION, first)
    registry.promote(second)
    assert moved_by_hand(client, name) is None
    client.delete_registered_model_alias(name, PREVIOUS)
    assert "previous is nobody, the last decision says version 1" in str(moved_by_hand(client, name))

    client.delete_registered_model_alias(name, CHAMPION)
    client.set_registered_model_alias(name, PREVIOUS, first)
    assert registry.promote(second).champion  # the first one again: nothing is before it
    assert registry.aliases() == (second, None)
    assert moved_by_hand(client, name) is None


@pytest.mark.parametrize(
    ("call", "survived", "left", "told"),
    [
        ("set_registered_model_tag", 0, ("1", None), None),
        ("set_registered_model_alias", 0, ("1", None), "champion is version 1, the last decision says version 2"),
        ("set_registered_model_alias", 1, ("1", "1"), "champion is version 1, the last decision says version 2"),
    ],
)
def test_a_promotion_that_dies_on_the_way_is_told_and_can_be_said_again(
    registry: MadeUp,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    survived: int,
    left: tuple[str, str | None],
    told: str | None,
) -> None:
    client, name = registry.client, registry.name
    first, second = registry.add(0.5), registry.add(0.9)
    registry.promote(first)
    real, calls = getattr(client, call), []

    def dies(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > survived:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(client, call, dies)
        registry.promote(second)
    assert registry.aliases() == left
    assert decided(client, name, second) is None
    difference = moved_by_hand(client, name)
    assert difference is None if told is None else told in str(difference)
    assert registry.promote(second).champion
    assert registry.aliases() == (second, first)
    assert moved_by_hand(client, name) is None
