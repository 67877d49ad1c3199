"""What is known of a rank's steps once they are profiled: plain values, which a driver reads without torch."""

from collections.abc import Mapping
from dataclasses import dataclass

WARM_STEPS = 5  # not counted: caches fill, threads and buffers are made
TRACED_STEPS = 5
OTHER = "other"
PARTS = (
    *("data wait", "host to device", "forward", "backward", "communication", "optimizer"),
    *("logging", "evaluation", "agreement", "checkpoint", OTHER),
)
"""Of a step, in the order in which they are shown. Other: the loss, its means for the curves, and the loop itself."""


@dataclass(frozen=True)
class Traffic:
    """Collectives of one rank.

    Fields:
        calls: how many.
        payload: bytes of the whole tensors that they were about.
        sent: bytes that a rank sends for them, on average over the ranks; see profiling.collectives.
    """

    calls: int = 0
    payload: int = 0
    sent: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.calls + other.calls, self.payload + other.payload, self.sent + other.sent)


@dataclass(frozen=True)
class StepProfile:
    """Means over a rank's steps.

    Fields:
        steps: that were counted.
        seconds: of a step, by part; they add up to it. Empty without steps.
        traffic: collectives of all the steps.
        images: of all the steps, over all ranks.
    """

    steps: int
    seconds: Mapping[str, float]
    traffic: Traffic
    images: int

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())
