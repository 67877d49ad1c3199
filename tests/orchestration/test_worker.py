"""The loop on its own: no Ray, no DeepSpeed, no MLflow."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestration.assembly import Data, build_model, training_stream
from orchestration.bare import train_bare
from orchestration.curves import Curves, quantile
from orchestration.engine import PlainEngine
from orchestration.recipe import Recipe
from orchestration.schedule import Schedule
from orchestration.worker import DivergedError, StepReport, curve_names, train


def changed(recipe: Recipe, section: str, **fields: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=fields)})


def test_the_bare_loop_is_one_call_and_learns(recipe: Recipe, data: Data) -> None:
    reports: list[StepReport] = []
    model = train_bare(changed(recipe, "train", steps=60), data, hooks=(reports.append,))
    losses = [float(report.means[1]) for report in reports]
    assert [report.step for report in reports] == list(range(60))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_bare_loop_loads_no_service(recipe: Recipe, data: Data) -> None:
    """In a fresh process, since other tests load Ray and MLflow."""
    import json
    import subprocess

    program = (
        "import json, sys; from pathlib import Path\n"
        "from orchestration.assembly import Data; from orchestration.bare import train_bare\n"
        "from orchestration.recipe import parse_recipe\n"
        "train_bare(parse_recipe(json.loads(sys.argv[1])), Data(Path(sys.argv[2]), Path(sys.argv[3])))\n"
        "print(sorted({'ray', 'deepspeed', 'mlflow'} & set(sys.modules)))"
    )
    fields = json.dumps(changed(recipe, "train", steps=2, gate_from=0).model_dump(mode="json"))
    command = [sys.executable, "-c", program, fields, str(data.train), str(data.eval)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("largest", [1, 5, 7])
def test_micro_batches_do_not_change_the_curve(recipe: Recipe, data: Data, largest: int) -> None:
    """200 samples in batches of 16: the last step of an epoch, the 13th, is short."""
    whole, parts = [], []
    twenty = changed(recipe, "train", steps=14)
    train_bare(twenty, data, hooks=(whole.append,))
    train_bare(changed(twenty, "train", micro_batch=largest), data, hooks=(parts.append,))
    assert [report.batch_size for report in whole] == [16] * 12 + [8] + [16]
    for ours, theirs in zip(parts, whole, strict=True):
        assert torch.allclose(ours.means[:3], theirs.means[:3], rtol=1e-3), ours.step


def test_slices_of_a_step_add_up_to_it_for_every_world_size(recipe: Recipe, data: Data) -> None:
    """The first step of one process is the sum over ranks, whatever their number."""

    def first_step(rank: int, world: int) -> StepReport:
        reports: list[StepReport] = []
        engine = PlainEngine(build_model(recipe))
        one = changed(changed(recipe, "train", micro_batch=3), "train", steps=1, gate_from=0)
        with training_stream(one, data.train, build_model(one).noise_shapes(), rank, world) as stream:
            train(engine, stream, Schedule(one.train), hooks=[reports.append])
        return reports[0]

    whole = first_step(0, 1).means
    for world in (2, 3, 5, 20):  # with 20 ranks some have no sample
        means = [first_step(rank, world).means for rank in range(world)]
        assert torch.allclose(torch.stack(means).sum(dim=0), whole, rtol=1e-5, atol=1e-7)


def test_points_are_those_of_every_nth_step_and_carry_their_time(recipe: Recipe, data: Data) -> None:
    seconds = iter(range(1, 100))
    engine = PlainEngine(build_model(recipe))
    curves = Curves(engine, every=3, num_slots=4, now=lambda: float(next(seconds)))
    reports: list[StepReport] = []
    with training_stream(recipe, data.train, build_model(recipe).noise_shapes()) as stream:
        train(engine, stream, Schedule(recipe.train), hooks=[reports.append, curves.record])
    curves.add({"eval/fg_ari": 0.5}, 6)
    points = curves.take()
    assert curves.take() == []
    losses = {step: (value, when) for name, value, when, step in points if name == "loss/total"}
    assert {step: when for step, (_, when) in losses.items()} == {3: 3000, 6: 6000, 9: 9000, 12: 12000}
    assert all(losses[r.done][0] == pytest.approx(float(r.means[0])) for r in reports if r.done in losses)
    assert [step for _, _, _, step in points] == sorted(step for _, _, _, step in points)
    assert ("eval/fg_ari", 0.5, 13000, 6) in points
    assert {name for name, _, _, step in points if step == 3} >= set(curve_names(4)) - {"loss/commitment"}


@given(kept=st.lists(st.integers(0, 7), min_size=1, max_size=200), q=st.sampled_from([0.1, 0.5, 0.9]))
def test_quantiles_of_a_histogram_are_those_of_its_images(kept: list[int], q: float) -> None:
    shares = torch.bincount(torch.tensor(kept), minlength=8).float() / len(kept)
    assert quantile(shares.tolist(), q) == np.quantile(kept, q, method="inverted_cdf")


def test_the_histogram_of_a_step_is_that_of_its_images(recipe: Recipe, data: Data) -> None:
    """Before the gate decides every slot is kept; with it, the mean and the quantiles follow from the histogram."""
    engine = PlainEngine(build_model(recipe))
    curves = Curves(engine, every=1, num_slots=4)
    reports: list[StepReport] = []
    with training_stream(recipe, data.train, build_model(recipe).noise_shapes()) as stream:
        train(engine, stream, Schedule(recipe.train), hooks=[reports.append, curves.record])
    numbers = torch.arange(5.0)
    for report in reports:
        histogram = report.means[-5:]
        assert float(histogram.sum()) == pytest.approx(1, abs=1e-6)
        assert float(histogram @ numbers) == pytest.approx(float(report.means[3]), abs=1e-5)
    points = {(name, step): value for name, value, _, step in curves.take()}
    for name in ("slots/kept_p10", "slots/kept_p50", "slots/kept_p90"):
        assert [points[name, step] for step in (1, 2, 3)] == [4.0, 4.0, 4.0]
    assert points["slots/kept_p10", 12] <= points["slots/kept_p50", 12] <= points["slots/kept_p90", 12] <= 4
    assert points["train/temperature", 12] == recipe.train.temperature


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(recipe: Recipe, data: Data) -> None:
    engine = PlainEngine(build_model(recipe))
    curves = Curves(engine, every=10, num_slots=4)
    wild = changed(recipe, "train", learning_rate=1e30, steps=4)
    with training_stream(wild, data.train, build_model(wild).noise_shapes()) as stream:
        train(engine, stream, Schedule(wild.train), hooks=[curves.record])
    with pytest.raises(DivergedError, match=r"loss/total: (nan|inf) at step [234]; lower train.learning_rate"):
        curves.take()


def test_the_ledger_of_a_run_holds_every_sample_once_an_epoch(recipe: Recipe, data: Data, tmp_path: Path) -> None:
    epoch = changed(recipe, "train", steps=13)
    engine = PlainEngine(build_model(epoch))
    with training_stream(epoch, data.train, build_model(epoch).noise_shapes(), ledger=tmp_path / "ledger") as stream:
        train(engine, stream, Schedule(epoch.train))
    samples = [int(line.split()[3]) for line in (tmp_path / "ledger").read_text().splitlines()]
    assert sorted(samples) == list(range(200))
