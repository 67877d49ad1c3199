"""What changes over a run, as functions of the step alone."""

from dataclasses import dataclass

from orchestration.recipe import TrainSection
from slot_models import Stage


@dataclass(frozen=True)
class Schedule:
    """Learning rate and gate of a step, counted from 0."""

    train: TrainSection

    @property
    def steps(self) -> int:
        return self.train.steps

    def learning_rate(self, step: int) -> float:
        """Warm-up times exponential decay, as published (the decay runs during warm-up too), times a final fall."""
        train = self.train
        rate = train.learning_rate
        if train.warmup_steps:
            rate *= min(1.0, (step + 1) / train.warmup_steps)
        if train.half_life:
            rate *= 0.5 ** (step / train.half_life)
        if train.decay_steps:
            rate *= min(1.0, (train.steps - step) / train.decay_steps)
        return rate

    def stage(self, step: int) -> Stage:
        """What the gate does: keeps every slot, drops some at random, decides."""
        if step >= self.train.gate_from:
            return "deciding"
        random_from = self.train.random_from
        return "random" if random_from is not None and step >= random_from else "open"

    def temperature(self, step: int) -> float:
        """Of the gate's gradient: geometric from the gate's first step to the end."""
        train = self.train
        if train.temperature_end is None:
            return train.temperature
        progress = max(0.0, (step - train.gate_from) / (train.steps - train.gate_from))
        return float(train.temperature * (train.temperature_end / train.temperature) ** progress)

    def keep_weight(self, step: int) -> float:
        """Weight of the penalty on the mean of keep: linear from the gate's first step to the end."""
        train = self.train
        if self.stage(step) != "deciding":
            return 0.0
        end = train.keep_weight if train.keep_weight_end is None else train.keep_weight_end
        return train.keep_weight + (end - train.keep_weight) * (step - train.gate_from) / (
            train.steps - train.gate_from
        )
