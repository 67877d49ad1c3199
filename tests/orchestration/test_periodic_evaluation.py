"""Evaluation while training: by the stage of training, with warnings and with what pictures are drawn from."""

from typing import Any

import pytest
import torch

from orchestration.assembly import Data, build_model, evaluation_batches
from orchestration.curves import Curves
from orchestration.engine import PlainEngine
from orchestration.glimpse import SCENES, Glimpse
from orchestration.periodic_evaluation import PeriodicEvaluation
from orchestration.recipe import Recipe, RecipeError, parse_recipe
from orchestration.schedule import Schedule
from orchestration.worker import StepReport


class Listener:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.glimpses: dict[int, Glimpse] = {}

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def picture(self, step: int, glimpse: bytes) -> None:
        self.glimpses[step] = Glimpse.from_bytes(glimpse)


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    fields = recipe.model_dump(mode="json")
    for section, values in sections.items():
        fields[section] |= values
    return parse_recipe(fields)


def report(done: int) -> StepReport:
    return StepReport(done - 1, torch.zeros(16), 0.0, 0.0, 1.0, 16, 1.0, 0.0)


def evaluated(
    recipe: Recipe, data: Data, steps: list[int], bias: float = -20.0
) -> tuple[dict[tuple[str, int], float], Listener, PlainEngine]:
    """Evaluations by a model whose gate would drop everything (or keep it)."""
    model = build_model(recipe)
    assert model.gate is not None
    with torch.no_grad():
        model.gate.logits.weight.zero_()
        model.gate.logits.bias.copy_(torch.tensor([-bias, bias]))
    engine, listener = PlainEngine(model), Listener()
    curves = Curves(engine, 1, recipe.model.num_slots)
    evaluation = PeriodicEvaluation(recipe, engine, data.eval, Schedule(recipe.train), curves, listener)
    for step in steps:
        evaluation(report(step))
        assert bool(evaluation.measured) == (step % recipe.evaluate.every == 0 or step == recipe.train.steps)
    return {(name, step): value for name, value, _, step in curves.take()}, listener, engine


def test_a_gate_decides_at_evaluations_from_the_step_on_where_it_decides_in_training(
    recipe: Recipe, data: Data
) -> None:
    late = changed(recipe, train={"gate_from": 6, "random_from": 3}, evaluate={"every": 3})
    points, listener, _ = evaluated(late, data, [3, 6, 7, 9, 12])
    assert {step for name, step in points if name == "eval/fg_ari"} == {3, 6, 9, 12}
    kept = {step: value for (name, step), value in points.items() if name == "eval/kept_mean"}
    # step 6 is done by the last step at which every slot was kept
    assert (kept[3], kept[6], kept[9], kept[12]) == (4, 4, 1, 1)
    assert (points["slots/always_on", 6], points["slots/dead", 6]) == (4, 0)
    assert points["slots/dead", 9] == 3
    assert len([text for text in listener.warnings if "a single one is kept in 100%" in text]) == 1


def test_slots_that_collapse_again_are_told_again(recipe: Recipe, data: Data) -> None:
    gateless = changed(recipe, model={"gate": None}, train={"keep_weight": 0.0})
    engine, listener = PlainEngine(build_model(gateless)), Listener()
    curves = Curves(engine, 1, 4)
    evaluation = PeriodicEvaluation(gateless, engine, data.eval, Schedule(gateless.train), curves, listener)
    evaluation(report(6))
    assert listener.warnings == [], "what keeps all slots by design has not collapsed"

    keeps_all, listener, _ = evaluated(recipe, data, [6, 12], bias=20.0)
    assert keeps_all["slots/always_on", 12] == 4
    assert len(listener.warnings) == 1 and listener.warnings[0].startswith("all 4 slots are kept in 100%")


def test_a_glimpse_holds_the_first_images_and_what_the_model_makes_of_them(recipe: Recipe, data: Data) -> None:
    _, listener, engine = evaluated(recipe, data, [6, 12], bias=0.0)
    assert set(listener.glimpses) == {6, 12}
    glimpse = listener.glimpses[12]
    stream, _ = evaluation_batches(recipe, data.eval)
    with stream:
        images = stream.step(0)[0].images[:SCENES]
    expected = engine.evaluate(images, trace=True)
    torch.testing.assert_close(
        torch.from_numpy(glimpse.images).permute(0, 3, 1, 2) / 127.5 - 1, images, atol=5e-3, rtol=0
    )
    for name in ("keep", "masks", "pictures", "reconstruction", "attention"):
        seen, whole = getattr(glimpse.output, name), getattr(expected, name)
        torch.testing.assert_close(seen, whole.float(), atol=2e-3, rtol=2e-3, msg=name)
    assert glimpse.counts is not None and glimpse.counts.images == 30


def test_pictures_are_taken_at_every_evaluation_or_at_some(recipe: Recipe, data: Data) -> None:
    sparse = changed(recipe, evaluate={"every": 3}, tracking={"pictures_every": 9})
    _, listener, _ = evaluated(sparse, data, [3, 6, 9, 12])
    assert set(listener.glimpses) == {9, 12}, "the last one always"
    with pytest.raises(RecipeError, match=r"tracking.pictures_every: 10 is not a multiple of evaluate.every: 3.*12"):
        changed(recipe, evaluate={"every": 3}, tracking={"pictures_every": 10})


def test_a_long_run_has_pictures_of_a_bounded_number_of_steps(recipe: Recipe, data: Data) -> None:
    often = changed(recipe, train={"steps": 1203}, evaluate={"every": 1})
    _, listener, _ = evaluated(often, data, [*range(20, 60), 1203])
    assert sorted(listener.glimpses) == [25, 50, 1203], "49 of them would be 25 steps apart, and the last one always"
