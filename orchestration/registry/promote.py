"""Who is champion: decided on the same held-out images, moved under a lock, written down where people look."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orchestration.recipe import RegistrySection
from orchestration.registry.gate import judge
from orchestration.registry.lock import PromotionError, PromotionLock
from orchestration.registry.record import Contender, Record, now
from orchestration.tracking import is_absent

CHAMPION, PREVIOUS = "champion", "previous"
DECISION = "slotforge.decision"
"""Tag of a registered model: where the last decision put its aliases."""


@dataclass(frozen=True)
class Decision:
    """What became of a version.

    Fields:
        name, version: of the model.
        champion: whether it holds the alias.
        reason: why it does, or does not.
    """

    name: str
    version: str
    champion: bool
    reason: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}@{CHAMPION}" if self.champion else f"models:/{self.name}/{self.version}"


def promote(
    client: MlflowClient,
    candidate: Contender,
    gate: RegistrySection,
    champion: Callable[[str], Contender],
) -> Decision:
    """Puts a version to the gate, and moves the alias if it passes.

    The champion is scored without the lock, which may take long; if it is another one by the time the lock is held,
    the candidate is compared with that one. So of several promotions at once each meets the winner before it.

    Args:
        champion: loads a version of the model and scores it on the candidate's held-out set.

    Raises:
        PromotionError: nothing is decided.
    """
    name, version = candidate.name, candidate.version
    while True:
        before = holder(client, name, CHAMPION)
        if before == version:
            return Decision(name, version, True, "it is the champion already")
        rival = None if before is None else champion(before)
        verdict = judge(
            candidate.scores,
            None if rival is None else rival.scores,
            gate,
            same_target=rival is None or rival.trained.reconstructs_as(candidate.trained),
            rival=f"version {before}",
        )
        record = Record(candidate, rival, gate, verdict, now())
        record.tag(client)
        with PromotionLock(client, name) as lock:
            if holder(client, name, CHAMPION) != before:
                continue
            if verdict.passed:
                _move(client, name, lock, {PREVIOUS: before, CHAMPION: version}, before)  # the way back first
            record.conclude(client)
        return Decision(name, version, verdict.passed, verdict.reason)


def rollback(client: MlflowClient, name: str) -> tuple[str, str]:
    """Swaps champion and previous; the same again swaps them back.

    Returns:
        The versions that are champion now, and that were.

    Raises:
        ValueError: there is no such model, no champion, or nothing before it.
        PromotionError: nothing is decided.
    """
    _recorded(client, name)  # before a queue is made for a name that is not there
    with PromotionLock(client, name) as lock:
        current, before = holder(client, name, CHAMPION), holder(client, name, PREVIOUS)
        if current is None:
            raise ValueError(f"{name}: it has no champion to take back; see its versions in MLflow")
        if before is None or before == current:
            raise ValueError(f"{name}: version {current} is the first champion, there is none to go back to")
        _move(client, name, lock, {CHAMPION: before, PREVIOUS: current}, current)
        when = now()
        client.set_model_version_tag(name, before, "gate", f"champion again: a rollback from version {current}, {when}")
        client.set_model_version_tag(name, current, "gate", f"not champion: a rollback to version {before}, {when}")
    return before, current


def decided(client: MlflowClient, name: str, version: str) -> Decision | None:
    """What the registry says of a version that was put to the gate, or rolled back, before; None: it was not."""
    reason = client.get_model_version(name, version).tags.get("gate")
    if reason is None:
        return None
    return Decision(name, version, holder(client, name, CHAMPION) == version, reason)


def moved_by_hand(client: MlflowClient, name: str) -> str | None:
    """How the aliases differ from where the last decision put them; None: they do not.

    They do after a hand in MLflow's UI, and after a promotion that was killed between writing down and moving.

    Raises:
        ValueError: there is no such registered model.
    """
    recorded = _recorded(client, name)
    there = {alias: holder(client, name, alias) for alias in (CHAMPION, PREVIOUS)}
    differences = [
        f"{alias} is {_called(there[alias])}, the last decision says {_called(recorded.get(alias))}"
        for alias in there
        if there[alias] != recorded.get(alias)
    ]
    return f"{name}: {'; '.join(differences)}" if differences else None


def _recorded(client: MlflowClient, name: str) -> dict[str, str | None]:
    """Where the last decision put the aliases.

    Raises:
        ValueError: there is no such registered model.
    """
    try:
        tag = client.get_registered_model(name).tags.get(DECISION)
    except MlflowException as error:
        if is_absent(error):
            raise ValueError(f"{name}: there is no such registered model") from error
        raise
    recorded: dict[str, str | None] = json.loads(tag) if tag else {}
    return recorded


def holder(client: MlflowClient, name: str, alias: str) -> str | None:
    """The version that an alias stands for; None where there is none."""
    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if not is_absent(error):
            raise
        return None


def _move(
    client: MlflowClient, name: str, lock: PromotionLock, aliases: Mapping[str, str | None], before: str | None
) -> None:
    """Sets aliases, one after the other, if the champion is still the one before. Written down first: whoever is killed
    in between leaves a difference that --check tells."""
    lock.check()
    if (found := holder(client, name, CHAMPION)) != before:
        raise PromotionError(
            f"{name}: somebody else moved {CHAMPION} to {_called(found)} this moment; nothing was moved, say it again"
        )
    client.set_registered_model_tag(name, DECISION, json.dumps({**aliases, "when": now()}))
    for alias, version in aliases.items():
        if version is not None:
            client.set_registered_model_alias(name, alias, version)
        elif holder(client, name, alias) is not None:
            client.delete_registered_model_alias(name, alias)
    if (found := holder(client, name, CHAMPION)) != aliases[CHAMPION]:
        wanted = _called(aliases[CHAMPION])
        raise PromotionError(
            f"{name}: {CHAMPION} was set to {wanted}, and now {_called(found)} holds it; look who moved it"
        )


def _called(version: str | None) -> str:
    return "nobody" if version is None else f"version {version}"
