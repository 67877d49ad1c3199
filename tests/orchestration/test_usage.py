"""How images use the slots, against sums by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestration.assembly import Data, build_model, evaluation_batches
from orchestration.evaluate import evaluate
from orchestration.recipe import Recipe
from orchestration.usage import SlotUsage
from slot_models import SlotOutput


def output(keep: Tensor, masks: Tensor | None = None) -> SlotOutput:
    """Of keep [B, K]; pixels are shared evenly among the slots unless masks [B, K, H, W] say otherwise."""
    batch, slots = keep.shape
    masks = torch.full((batch, slots, 2, 2), 1 / slots) if masks is None else masks
    nothing = torch.zeros(batch, 3, 2, 2)
    return SlotOutput(
        slots=torch.zeros(batch, slots, 4),
        keep=keep,
        keep_probability=keep,
        masks=masks,
        pictures=None,
        reconstruction=nothing,
        target=nothing,
        auxiliary=torch.zeros(batch),
        code_tally=None,
    )


def usage(rows: list[list[int]], masks: Tensor | None = None) -> SlotUsage:
    keep = torch.tensor(rows, dtype=torch.float32)
    return SlotUsage.of(output(keep, masks), torch.ones(len(rows)))


@given(
    rows=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=12),
    real=st.lists(st.booleans(), min_size=12, max_size=12),
    cut=st.integers(0, 12),
)
def test_sums_are_those_of_the_real_images_however_they_are_cut(
    rows: list[list[bool]], real: list[bool], cut: int
) -> None:
    keep, weight = torch.tensor(rows, dtype=torch.float32), torch.tensor(real[: len(rows)], dtype=torch.float32)
    parts = [SlotUsage.of(output(keep[part]), weight[part]) for part in (slice(0, cut), slice(cut, None))]
    whole = parts[0] + parts[1]
    counted = [row for row, one in zip(rows, real, strict=False) if one]
    assert whole.kept.tolist() == [sum(row[slot] for row in counted) for slot in range(3)]
    assert whole.by_number.tolist() == [sum(sum(row) == number for row in counted) for number in range(4)]
    assert whole.images == len(counted)
    assert torch.equal(SlotUsage.from_tensor(3, whole.tensor()).tensor(), whole.tensor())


def test_dead_and_always_on_slots() -> None:
    found = usage([[1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0]])
    assert (found.dead, found.always_on) == ([1, 3], [0])
    assert found.metrics() == {"dead": 2, "always_on": 1, "one_takes_all": 0}
    assert found.collapses(needed=2.0) == []


def test_all_slots_kept_is_a_collapse_unless_all_are_needed() -> None:
    everything = usage([[1, 1, 1]] * 4)
    for needed in (None, 2.0):
        (sentence,) = everything.collapses(needed)
        assert sentence.startswith("all 3 slots are kept in 100% of the held-out images")
    assert everything.collapses(needed=3.0) == []
    assert usage([[1, 1, 1]] * 3 + [[1, 1, 0]]).collapses(needed=2.0) == []


def test_none_or_one_kept_is_a_collapse_unless_one_is_all_there_is() -> None:
    for rows in ([[0, 0, 0]] * 4, [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0]]):
        (sentence,) = usage(rows).collapses(needed=2.5)
        assert sentence.startswith("no slot or a single one is kept in 100% of the held-out images")
        assert usage(rows).collapses(needed=1.0) == []
    assert usage([[1, 0, 0]] * 3 + [[1, 1, 0]]).collapses(needed=2.5) == []


def test_one_slot_with_all_the_pixels_is_a_collapse() -> None:
    masks = torch.zeros(3, 2, 4, 4)
    masks[:, 1] = 1.0
    found = usage([[1, 1]] * 3, masks)
    (sentence,) = found.collapses(needed=2.0)
    assert sentence.startswith("one slot has all the pixels in 100% of the held-out images")
    assert found.metrics()["one_takes_all"] == 1.0
    masks[0, :, :2] = 0.5
    assert usage([[1, 1]] * 3, masks).collapses(needed=2.0) == []


@pytest.mark.parametrize("bias", [-20.0, 20.0])
def test_an_evaluation_tells_of_a_gate_that_keeps_all_or_none(recipe: Recipe, data: Data, bias: float) -> None:
    model = build_model(recipe).eval()
    assert model.gate is not None
    with torch.no_grad():
        model.gate.logits.weight.zero_()
        model.gate.logits.bias.copy_(torch.tensor([-bias, bias]))
    stream, steps = evaluation_batches(recipe, data.eval)
    with stream:
        batches = (micro for step in range(steps) for micro in stream.step(step))
        evaluation = evaluate(model, batches, num_slots=4, background_slots=0)
    assert evaluation.usage is not None and evaluation.usage.images == 30
    word = "all 4 slots are kept" if bias > 0 else "a single one is kept"
    assert any(word in sentence for sentence in evaluation.collapses())
