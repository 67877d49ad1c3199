"""A decision of the gate with all its figures, written on the version: tags for programs, a table for people."""

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

from mlflow import MlflowClient

from orchestration.recipe import RegistrySection
from orchestration.registry.gate import Verdict
from orchestration.registry.trained import Trained
from orchestration.scores import Estimate, Scores

_MARK = "<!-- slotforge: what the gate decided -->"  # what stands before it in a description is somebody else's


@dataclass(frozen=True, eq=False)
class Contender:
    """A registered version that was scored on a held-out set.

    Fields:
        trained: its parts and weights.
        held_out: the set's digest.
    """

    name: str
    version: str
    trained: Trained
    scores: Scores
    held_out: str


@dataclass(frozen=True, eq=False)
class Record:
    """What is written down about a candidate."""

    candidate: Contender
    champion: Contender | None
    gate: RegistrySection
    verdict: Verdict
    when: str

    def tag(self, client: MlflowClient) -> None:
        """The figures: eval.<metric>, eval.data and, as JSON, gate.decision."""
        name, version = self.candidate.name, self.candidate.version
        tags = {f"eval.{metric}": f"{value:.6f}" for metric, value in _metrics(self.candidate.scores).items()}
        tags |= {"eval.data": self.candidate.held_out, "gate.decision": json.dumps(self._decision(), allow_nan=False)}
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)

    def conclude(self, client: MlflowClient) -> None:
        """The verdict: the version's description, and last the tag gate, which says that it is decided."""
        name, version = self.candidate.name, self.candidate.version
        theirs = (client.get_model_version(name, version).description or "").partition(_MARK)[0].rstrip()
        text = "\n\n".join(part for part in (theirs, _MARK, self._table()) if part)
        client.update_model_version(name, version, description=text)
        client.set_model_version_tag(name, version, "gate", self.verdict.reason)

    def _contenders(self) -> list[tuple[str, Contender]]:
        pairs = [("candidate", self.candidate), ("champion", self.champion)]
        return [(role, contender) for role, contender in pairs if contender is not None]

    def _decision(self) -> dict[str, Any]:
        comparison = self.verdict.comparison
        return {
            "passed": self.verdict.passed,
            "when": self.when,
            "held_out": self.candidate.held_out,
            "images": self.candidate.scores.images,
            "gate": self.gate.model_dump(mode="json", exclude={"model"}),
            "champion": self.champion and self.champion.version,
            "comparison": {key: plain(value) for key, value in asdict(comparison).items()} if comparison else None,
            "figures": {
                role: {name: figure(estimate) for name, estimate in contender.scores.estimates.items()}
                for role, contender in self._contenders()
            },
        }

    def _table(self) -> str:
        columns = [contender.scores.estimates for _, contender in self._contenders()]
        titles = ["this version", *([f"version {self.champion.version}"] if self.champion else [])]
        lines = [
            f"**{'Champion' if self.verdict.passed else 'Not champion'}**, {self.when}: {self.verdict.reason}",
            "",
            f"On {self.candidate.scores.images} held-out images ({self.candidate.held_out[:12]}); in brackets the 95 % "
            "interval over images:",
            "",
            f"| metric | {' | '.join(titles)} |",
            f"|---|{'---|' * len(titles)}",
        ]
        for metric in columns[0]:
            cells = [shown(column[metric]) if metric in column else "" for column in columns]
            lines.append(f"| {metric} | {' | '.join(cells)} |")
        return "\n".join(lines)


def shown(estimate: Estimate) -> str:
    """For people: value and interval."""
    if math.isnan(estimate.low):
        return f"{estimate.value:.4f}"
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def figure(estimate: Estimate) -> dict[str, float | None]:
    """For JSON: value, low and high."""
    return {key: plain(value) for key, value in asdict(estimate).items()}


def plain(value: Any) -> Any:
    """For JSON, which has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _metrics(scores: Scores) -> dict[str, float]:
    return {name: value for name, value in scores.evaluation().metrics().items() if math.isfinite(value)}
