"""Every term of the loss is a curve with its weight, for each recipe in the package and each variant of the model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from orchestration.assembly import build_model
from orchestration.curves import Curves
from orchestration.engine import PlainEngine
from orchestration.planning.measure import synthetic_batch
from orchestration.recipe import Recipe, load_recipe, parse_recipe
from orchestration.recipe_files import recipe_names
from orchestration.schedule import Schedule
from orchestration.worker import train
from pipelines.batches import MicroBatch
from slot_models.meta import MetaSlotAttention

IMAGES = 2
HEADS = {"kind": "heads", "heads": 2, "dim_head": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "no gate": {"gate": None},
    "gate": {"gate": {}},
    "gate by difference": {"gate": {"gradient": "difference", "exploration": 0.05}},
    "codebook": {"gate": None, "codebook": {"size": 6, "commitment": 0.25}},
    "codebook without commitment": {"gate": None, "codebook": {"size": 6}},
    "codebook of heads": {"gate": None, "codebook": {"size": 6, "commitment": 2.0}, "attention": HEADS},
    "bilevel": {"attention": {"gradient": "bilevel", "initial": "per_slot"}},
    "implicit": {"attention": {"gradient": "implicit"}},
    "joint heads": {"attention": HEADS | {"competition": "joint"}},
    "upsampling": {"image_size": 16, "decoder": {"kind": "upsampling", "channels": 4, "strides": [2, 1]}},
}


class Recorded(PlainEngine):
    """Notes what is learnt from."""

    loss: float

    def backward(self, loss: Tensor, share: Tensor) -> None:
        self.loss = float((loss * share).sum().detach())
        super().backward(loss, share)


class Batches:
    """The same few images in every step."""

    waited = 0.0

    def __init__(self, micro: MicroBatch) -> None:
        self._micro = micro

    def batch_size(self, step: int) -> int:
        return IMAGES

    def step(self, step: int) -> list[MicroBatch]:
        return [self._micro]


def last_step(recipe: Recipe) -> tuple[dict[str, float], float, float]:
    """The curves of a run's last step, the loss that was learnt from, and the mean commitment before its weight."""
    model = build_model(recipe)
    committed: list[float] = []
    if isinstance(model.slot_attention, MetaSlotAttention):
        model.slot_attention.register_forward_hook(
            lambda _, __, found: committed.append(float(found.commitment.detach().mean()))
        )
    commitment = recipe.model.codebook.commitment if recipe.model.codebook else None
    curves = Curves(engine := Recorded(model), 1, recipe.model.num_slots, commitment)
    batches, schedule = Batches(synthetic_batch(recipe, model, IMAGES)), Schedule(recipe.train)
    train(engine, batches, schedule, start=schedule.steps - 1, hooks=[curves.record])
    points = {name: value for name, value, _, _ in curves.take()}
    return points, engine.loss, committed[-1] if committed else 0.0


def check(recipe: Recipe) -> dict[str, float]:
    points, loss, committed = last_step(recipe)
    terms = {name: value for name, value in points.items() if name.startswith("loss/")}
    total = terms.pop("loss/total")
    assert total == pytest.approx(loss, rel=1e-5), "the curve is of what is learnt from"
    assert sum(terms.values()) == pytest.approx(total, rel=1e-5)
    assert terms["loss/keep"] == pytest.approx(points["train/keep_weight"] * points["slots/kept_fraction"], rel=1e-5)
    assert points["train/temperature"] == Schedule(recipe.train).temperature(recipe.train.steps - 1)
    if recipe.model.codebook is None:
        assert terms.keys() == {"loss/reconstruction", "loss/keep"} and "train/commitment_weight" not in points
    else:
        assert points["train/commitment_weight"] == recipe.model.codebook.commitment
        assert terms["loss/commitment"] == pytest.approx(points["train/commitment_weight"] * committed, rel=1e-5)
    return terms


@pytest.mark.parametrize("name", recipe_names())
def test_the_terms_of_a_recipe_in_the_package_add_up_to_its_loss(name: str) -> None:
    recipe = load_recipe(name)
    assert (check(recipe)["loss/keep"] > 0) == (recipe.train.keep_weight > 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_terms_of_a_variant_add_up_to_its_loss(name: str, recipe: Recipe) -> None:
    fields = recipe.model_dump(mode="json")
    fields["data"] = {"train": "train", "eval": "eval"}
    fields["model"] |= VARIANTS[name]
    gated = fields["model"]["gate"] is not None
    fields["train"] |= {"keep_weight": 0.3 if gated else 0.0, "temperature": 2.0, "temperature_end": 0.5}
    terms = check(parse_recipe(fields))
    assert (terms["loss/keep"] > 0) == gated
    assert (terms.get("loss/commitment", 0) > 0) == (name in ("codebook", "codebook of heads"))


def test_the_weight_of_a_term_follows_its_schedule(recipe: Recipe) -> None:
    fields = recipe.model_dump(mode="json")
    fields["train"] |= {"steps": 4, "gate_from": 2, "keep_weight": 0.4, "keep_weight_end": 0.2}
    mine = parse_recipe(fields)
    model = build_model(mine)
    curves = Curves(engine := PlainEngine(model), 1, mine.model.num_slots)
    train(engine, Batches(synthetic_batch(mine, model, IMAGES)), Schedule(mine.train), hooks=[curves.record])
    found = torch.tensor([value for name, value, _, _ in curves.take() if name == "train/keep_weight"])
    assert torch.allclose(found, torch.tensor([0.0, 0.0, 0.4, 0.3]))
