"""The gate that the alias champion has to pass: floors, and a paired comparison with the champion. Numbers alone."""

from dataclasses import dataclass

import numpy as np

from orchestration.evaluate import yardstick
from orchestration.recipe import RegistrySection
from orchestration.scores import Scores, difference_bound
from orchestration.wording import counted


@dataclass(frozen=True)
class Comparison:
    """A candidate and a champion on the same images.

    Fields:
        metric: by which they are compared.
        images: that both have a value of.
        candidate, champion: means over them.
        difference: how much better the candidate is, and
        bound: what the difference is above, with the gate's confidence; larger is better for either.
    """

    metric: str
    images: int
    candidate: float
    champion: float
    difference: float
    bound: float


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate may be champion, and why."""

    passed: bool
    reason: str
    comparison: Comparison | None = None


def judge(
    candidate: Scores, champion: Scores | None, gate: RegistrySection, *, same_target: bool = True, rival: str = ""
) -> Verdict:
    """Judges a candidate.

    The floors hold for its means over the set. Against the champion it passes if, with the gate's confidence, it is not
    worse by more than the tolerated loss: the one-sided lower bound of the mean difference over the same images, by a
    paired bootstrap, is at least minus that loss. What is not a number does not pass.

    Args:
        champion: on the same images in the same order; None where there is none.
        same_target: whether the two reconstruct the same thing, so that errors can be compared.
        rival: what to call the champion.

    Raises:
        ValueError: the two are not of the same images.
    """
    if refusal := _below_a_floor(candidate, gate):
        return Verdict(False, refusal)
    if champion is None:
        return Verdict(True, "the floors hold, and there is no champion yet")
    if not np.array_equal(candidate.objects, champion.objects):
        raise ValueError("champion: its scores are of other images than the candidate's; score both on one set")
    ours, theirs = candidate.per_image(), champion.per_image()
    metric, sign = yardstick(ours, gate.metric)
    if metric not in ours or np.isnan(ours[metric]).all():
        return Verdict(False, f"registry.metric: the held-out set does not tell {metric}; name another or add masks")
    if metric == "reconstruction" and not same_target:
        return Verdict(
            False,
            f"registry.metric: {rival} reconstructs something else, so errors cannot be compared; name a metric of "
            "masks or counts",
        )
    told = ~(np.isnan(ours[metric]) & np.isnan(theirs[metric]))  # the same images for both
    mine, yours = ours[metric][told], theirs[metric][told]
    if len(mine) < 2:
        return Verdict(False, f"data.eval: too few held-out images to compare by {metric}, {len(mine)}; hold out more")
    difference, bound = difference_bound(sign * mine, sign * yours, gate.confidence)
    found = Comparison(metric, len(mine), float(mine.mean()), float(yours.mean()), difference, bound)
    reason = (
        f"{metric} {found.candidate:.4f} against {found.champion:.4f} of {rival} on the same "
        f"{counted(len(mine), 'image')}; with {gate.confidence:.0%} confidence it is better by at least {bound:+.4f}"
    )
    if bound >= -gate.tolerated_loss:
        return Verdict(True, f"the floors hold; {reason}", found)
    return Verdict(False, f"{reason}, and the gate wants {0 - gate.tolerated_loss:+.4f}", found)


def _below_a_floor(candidate: Scores, gate: RegistrySection) -> str | None:
    if not gate.floors:
        return None
    metrics = candidate.evaluation().metrics()
    for name, floor in gate.floors.items():
        if name not in metrics:
            return f"registry.floors.{name}: the held-out set does not tell {name}; remove the floor or add masks"
        if not metrics[name] >= floor:
            return f"registry.floors.{name}: {metrics[name]:.3f} is below the floor {floor}"
    return None
