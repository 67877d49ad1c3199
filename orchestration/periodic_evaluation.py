"""The hook of the training loop that evaluates on the held-out set, on all ranks."""

from typing import Protocol

from torch import Tensor

from orchestration.assembly import evaluation_batches
from orchestration.curves import Curves
from orchestration.engine import Engine
from orchestration.evaluate import Evaluation, evaluate
from orchestration.glimpse import FirstScenes
from orchestration.recipe import Recipe
from orchestration.worker import Micro, Schedule, StepReport
from pipelines.sets import Place
from slot_models import SlotOutput, Stage

MOST_PICTURES = 50  # in a run, unless the recipe says how often


class Audience(Protocol):
    """Whoever watches the run."""

    def warn(self, text: str) -> None:
        """Told once of each collapse, until it is over."""

    def picture(self, step: int, glimpse: bytes) -> None:
        """Given a Glimpse's bytes when pictures are due."""


class PeriodicEvaluation:
    """Evaluates every so many steps and at the end, adds to the curves, and tells of slots that have collapsed.

    Until the gate has been trained to decide, it does not: all slots are kept, as they are in training.

    Args:
        place: of the held-out set.
        audience: of rank 0.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        place: Place,
        schedule: Schedule,
        curves: Curves,
        audience: Audience | None = None,
    ) -> None:
        self._recipe, self._engine, self._schedule, self._curves = recipe, engine, schedule, curves
        self._audience = audience
        self._held_out, self._steps = evaluation_batches(recipe, place, engine.rank, engine.world)
        self._collapsed: set[str] = set()
        self.measured: dict[str, float] = {}
        """Metrics at the step that was done last; empty where it was not evaluated."""

    def __call__(self, report: StepReport) -> None:
        self.measured = {}
        last = report.done == self._recipe.train.steps
        if report.done % self._recipe.evaluate.every and not last:
            return
        deciding = self._schedule.stage(report.step) == "deciding"
        pictures = last or report.done % _pictures_every(self._recipe) == 0
        scenes = FirstScenes()
        evaluation = self._evaluate(deciding, scenes if pictures else None)
        self.measured = evaluation.metrics()
        assert evaluation.usage is not None
        points = {f"eval/{name}": value for name, value in self.measured.items()}
        points |= {f"slots/{name}": value for name, value in evaluation.usage.metrics().items()}
        self._curves.add(points, report.done)
        if self._audience is not None:
            self._tell(evaluation if deciding and self._decides() else None, self._audience)
            glimpse = scenes.glimpse(evaluation.counts)
            if glimpse is not None:
                self._audience.picture(report.done, glimpse.to_bytes())

    def _evaluate(self, deciding: bool, scenes: FirstScenes | None) -> Evaluation:
        """With what the pictures show, of the first micro batch: all ranks trace it, since ZeRO-3 gathers weights."""
        first = scenes is not None
        stage: Stage = "deciding" if deciding else "open"

        def forward(images: Tensor) -> SlotOutput:
            nonlocal first
            trace, first = first, False
            output: SlotOutput = self._engine.evaluate(images, stage=stage, trace=trace)
            return output

        def look(micro: Micro, output: SlotOutput) -> None:
            if scenes is not None and self._audience is not None:
                scenes.look(micro, output)

        batches = (micro for step in range(self._steps) for micro in self._held_out.step(step))
        try:
            return evaluate(
                forward,
                batches,
                num_slots=self._recipe.model.num_slots,
                background_slots=self._recipe.evaluate.background_slots,
                device=self._engine.device,
                total=self._engine.sum,
                look=look,
            )
        finally:
            self._held_out.close()

    def _decides(self) -> bool:
        """Whether the model chooses among its slots."""
        return self._recipe.model.gate is not None or self._recipe.model.codebook is not None

    def _tell(self, evaluation: Evaluation | None, audience: Audience) -> None:
        """By what it begins with a collapse is known again: the percentages in it change."""
        found = {text.partition(" in ")[0]: text for text in (evaluation.collapses() if evaluation is not None else [])}
        for start, text in found.items():
            if start not in self._collapsed:
                audience.warn(text)
        self._collapsed = set(found)


def _pictures_every(recipe: Recipe) -> int:
    """Steps between pictures, a multiple of those between evaluations."""
    every, evaluations = recipe.evaluate.every, recipe.train.steps // recipe.evaluate.every
    return recipe.tracking.pictures_every or every * max(1, -(-evaluations // MOST_PICTURES))
