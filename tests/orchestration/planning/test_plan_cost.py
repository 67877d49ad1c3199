"""slotforge plan: its arithmetic against formulas, simulations and models that are really made and trained."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from orchestration.assembly import Data, build_model
from orchestration.cli import app
from orchestration.engine import PlainEngine
from orchestration.planning import measure as plan_measure
from orchestration.planning import plan as run_plan
from orchestration.planning.cost import (
    STAGES,
    ModelSize,
    best_interval,
    slowdown,
    state_memory,
    world_plans,
    worlds,
)
from orchestration.planning.measure import StepTime, activation_bytes, model_size, saved_bytes, scene_bytes, step_time
from orchestration.planning.plan import Assumptions, plan_run
from orchestration.planning.report import as_json
from orchestration.prepare import data_folders
from orchestration.recipe import Recipe, parse_recipe
from slot_models import SlotAutoencoder, build_autoencoder


def recipe_of(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    fields = recipe.model_dump(mode="json")
    for section, changes in sections.items():
        fields[section] |= changes
    return parse_recipe(fields)


MODELS: list[dict[str, Any]] = [{}, {"gate": None}, {"gate": None, "codebook": {"size": 8}}]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("model", MODELS, ids=["gate", "plain", "codebook"])
def test_a_model_is_counted_as_it_is_made_and_saved(
    recipe: Recipe, model: dict[str, Any], frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(**options: Any) -> SlotAutoencoder:
        made = build_autoencoder(**options)
        made.encoder.requires_grad_(not frozen)  # as a backbone is
        return made

    changed = recipe_of(recipe, model=model, train={"keep_weight": 0})
    monkeypatch.setattr(plan_measure, "build_autoencoder", build)
    counted, made = model_size(changed), build(**changed.model.model_dump())
    assert (counted.trained < counted.parameters) == frozen
    assert counted.parameters == sum(parameter.numel() for parameter in made.parameters())
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    assert counted.trained == sum(parameter.numel() for parameter in trained)
    # The bytes of a checkpoint are those that an engine gives away to be saved.
    state = {
        f"{kind}/{name}": value
        for name, values in PlainEngine(made).named_state(owned=False)
        for kind, value in values.items()
    }
    assert counted.checkpoint_bytes == sum(value.nbytes for value in state.values())
    header = len(save(state)) - counted.checkpoint_bytes
    assert 0 < header < 200 * len(state)


def test_zero_memory_by_hand() -> None:
    """12 parameters, 8 of them trained, on 4 ranks; 100 bytes of buffers."""
    size = ModelSize(parameters=12, trained=8, buffer_bytes=100, large=8)
    by_hand = {  # weights, copy, gradients, moments
        0: (48, 0, 32, 64),
        1: (48, 8, 32, 16),
        2: (48, 8, 8, 16),
        3: (12, 8, 8, 16),
    }
    for stage in STAGES:
        found = state_memory(size, stage, 4)
        assert (found.weights, found.copy, found.gradients, found.moments) == by_hand[stage]
        assert found.buffers == 100 and found.total == sum(by_hand[stage]) + 100
    small = dataclasses.replace(size, large=5)  # 3 values in tensors that stay gathered: 12 bytes on each rank
    assert state_memory(small, 3, 4).weights == 12 + 12 and state_memory(small, 2, 4) == state_memory(size, 2, 4)
    for stage in STAGES:
        alone, without = state_memory(size, stage, 1), state_memory(size, 0, 1)
        assert alone.total - alone.copy == without.total  # sharing with nobody saves nothing
    with pytest.raises(ValueError, match="stage: 4"):
        state_memory(size, 4, 1)
    with pytest.raises(ValueError, match="workers: 0"):
        state_memory(size, 0, 0)


def test_state_is_what_a_plain_engine_holds(recipe: Recipe) -> None:
    """Stage 0 on one rank is plain Adam: its tensors, counted."""
    model = build_model(recipe)
    engine = PlainEngine(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *model.buffers()]
    engine.optimizer.step()
    held += [value for state in engine.optimizer.state.values() for value in state.values() if value.ndim]
    persistent = sum(b.nbytes for name, b in model.named_buffers() if name not in model.state_dict())
    counted = state_memory(model_size(recipe), 0, 1).total
    assert counted == sum(tensor.nbytes for tensor in held if tensor is not None) - persistent


def test_activations_grow_linearly_with_the_micro_batch(recipe: Recipe) -> None:
    model = build_model(recipe)
    at = {samples: saved_bytes(recipe, model, samples) for samples in (1, 2, 3, 8)}
    fixed, each = activation_bytes(recipe)
    assert each > 0
    for samples, found in at.items():
        assert found == pytest.approx(fixed + each * samples, rel=1e-3)


def test_activations_are_what_a_plain_module_is_known_to_keep() -> None:
    """The counting itself, on a module whose saved tensors are written out: x for the weights' gradient, tanh's out."""

    class Known(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)

        def forward(self, x: torch.Tensor, *noise: Any, **options: Any) -> Any:
            hidden = self.first(x.flatten(1)[:, :7].contiguous()).tanh()
            found = self.second(hidden)
            output = found.sum(dim=1)[:, None, None, None]
            return Outcome(output, output.detach() * 0, found[:, :2], torch.zeros(len(x)))

        def noise_shapes(self) -> dict[str, tuple[int, ...]]:
            return {}

    class Outcome:
        def __init__(self, reconstruction: Any, target: Any, keep: Any, auxiliary: Any) -> None:
            self.reconstruction, self.target, self.keep, self.auxiliary = reconstruction, target, keep, auxiliary

    from orchestration.recipe import load_recipe

    known = saved_bytes(load_recipe("tetrominoes"), Known(), 6) - saved_bytes(load_recipe("tetrominoes"), Known(), 5)  # type: ignore[arg-type]
    floats = 7 + 5 + 1  # the first layer's input, tanh's output (once: it is also the second's input), the error
    assert known == 4 * floats


def test_young_and_daly() -> None:
    assert best_interval(2.0, 3600.0) == pytest.approx(120.0)
    # The best interval is the least of Daly's expected time, as far as a save is short against failures.
    for stall, mtbf in ((0.01, 3600.0), (2.0, 4 * 3600.0), (5.0, 24 * 3600.0)):
        best = best_interval(stall, mtbf)
        grid = best * np.linspace(0.2, 5, 2000)
        least = grid[np.argmin([slowdown(stall, interval, mtbf) for interval in grid])]
        assert least == pytest.approx(best, rel=0.03)
    for wrong in ((0.0, 1.0), (1.0, -1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="not above 0"):
            best_interval(*wrong)


def test_the_slowdown_is_that_of_simulated_failures() -> None:
    """A Poisson process of failures, work in intervals that have to be done in one go: simulated second by second."""
    stall, interval, mtbf, recovery = 3.0, 60.0, 200.0, 20.0
    generator = np.random.Generator(np.random.Philox(key=7))
    wall, intervals = 0.0, 4000
    for _ in range(intervals):
        while (fails := generator.exponential(mtbf)) < interval + stall:
            wall += fails
            while (again := generator.exponential(mtbf)) < recovery:
                wall += again
            wall += recovery
        wall += interval + stall
    simulated = wall / (intervals * interval)
    assert slowdown(stall, interval, mtbf, recovery) == pytest.approx(simulated, rel=0.03)
    assert slowdown(1.0, 1e6, 10.0) == math.inf


def plans(**changes: Any) -> list[Any]:
    given = {
        "steps": 1000,
        "batch_size": 60,
        "largest": 16,
        "checkpoint_every": 50,
        "activations": (100.0, 10.0),
        "sample_seconds": 0.01,
        "mtbf_hours": 4.0,
        "disk_rate": 1e6,
        "price_per_hour": 2.0,
    }
    size = ModelSize(parameters=1_000_000, trained=1_000_000, buffer_bytes=0)
    return world_plans(size, [1, 2, 3, 7, 60], **{**given, **changes})


def test_the_global_batch_is_the_same_at_every_number_of_workers() -> None:
    for plan in plans():
        computed = plan.workers * plan.accumulation * plan.micro_batch
        assert computed - plan.padding == 60
        assert 0 <= plan.padding < plan.workers * plan.accumulation + plan.workers
        assert plan.micro_batch <= 16
        assert plan.activations == 100 + 10 * plan.micro_batch


def test_times_and_costs_add_up() -> None:
    one, *_, sixty = plans()
    assert (one.accumulation, one.micro_batch, one.padding) == (4, 15, 0)
    assert one.step_seconds == pytest.approx(0.6) and sixty.step_seconds == pytest.approx(0.01)
    assert one.stall_seconds == pytest.approx(12.0) and sixty.stall_seconds == pytest.approx(0.2)
    assert one.checkpoint_seconds == pytest.approx(30.0)
    assert one.best_seconds == pytest.approx(math.sqrt(2 * 12 * 4 * 3600))
    assert one.best_steps == round(one.best_seconds / 0.6)
    assert sixty.best_seconds == pytest.approx(
        math.sqrt(2 * 0.2 * 4 * 3600 / 60)
    )  # sixty nodes fail sixty times as often
    assert one.hours == pytest.approx(600 * slowdown(12.0, 30.0, 4 * 3600) / 3600)
    assert one.cost == pytest.approx(one.hours * 2.0) and sixty.cost == pytest.approx(sixty.hours * 2.0 * 60)
    assert all(plan.hours is None and plan.cost is None for plan in plans(sample_seconds=None))
    assert all(plan.cost is None and plan.hours for plan in plans(price_per_hour=None))
    assert all(plan.hours is None for plan in plans(checkpoint_every=10**6))  # never saved between two failures


def test_the_numbers_of_workers_shown() -> None:
    assert worlds(1, 1) == [1]
    assert worlds(3, 3) == [3]
    assert worlds(2, 9) == [2, 4, 8, 9]
    assert worlds(3, 17) == [3, 4, 8, 16, 17]


def test_a_step_is_timed_by_the_loop_itself(recipe: Recipe) -> None:
    found = step_time(recipe, budget=60.0)
    assert found.micro_batch == recipe.train.batch_size and found.steps == 2
    assert 0 < found.sample_seconds < 1
    assert step_time(recipe, budget=0.0).micro_batch == 1  # no time for more


def test_rendered_samples_are_as_large_as_said(recipe: Recipe, data: Data) -> None:
    assert recipe.data.scenes is not None
    each = scene_bytes(recipe.data.scenes)
    assert each is not None and isinstance(data.train, Path)
    real = sum(path.stat().st_size for path in data.train.glob("*.tar")) / 200
    assert each == pytest.approx(real, rel=0.1)


def test_steps_of_an_epoch_come_from_the_shards_or_from_the_scenes(recipe: Recipe, data: Data) -> None:
    given = Assumptions(measure=False)
    scenes = plan_run(recipe, given).data
    assert (scenes.samples, scenes.steps_per_epoch, scenes.estimated) == (200, 13, True)
    for folder, made in zip(dataclasses.astuple(data_folders(recipe)), (data.train, data.eval), strict=True):
        shutil.copytree(str(made), str(folder))
    rendered = plan_run(recipe, given).data
    assert (rendered.samples, rendered.estimated, rendered.cache_bytes) == (200, False, 0.0)
    assert rendered.epochs == pytest.approx(12 / 13)
    assert isinstance(data.train, Path)
    assert rendered.bytes == sum(path.stat().st_size for path in data.train.glob("*.tar"))
    folders = {"scenes": None, "train": str(data.train), "eval": str(data.eval)}
    assert plan_run(recipe_of(recipe, data=folders), given).data.samples == 200
    absent = plan_run(recipe_of(recipe, data={**folders, "train": "/nowhere"}), given).data
    assert absent.samples is None and "/nowhere" in str(absent.note)


def test_a_given_step_is_of_the_given_workers(recipe: Recipe) -> None:
    wide = recipe_of(recipe, parallel={"workers": {"min": 1, "max": 4}})
    one = plan_run(wide, Assumptions(step_seconds=8.0)).worlds
    assert [(plan.workers, plan.step_seconds) for plan in one] == [(1, 8.0), (2, 4.0), (4, 2.0)]
    four = plan_run(wide, Assumptions(step_seconds=8.0, step_workers=4)).worlds
    assert [plan.step_seconds for plan in four] == [32.0, 16.0, 8.0]


def test_the_command(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(recipe.yaml())
    runner = CliRunner()
    shown = runner.invoke(app, ["plan", str(path), "--step-seconds", "0.5", "--price-per-hour", "3"])
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.output for word in ("parameters", "ZeRO 3", "Young", "6.0", "estimate"))
    priced = ["plan", str(path), "--step-seconds", "3600", "--set", "parallel.price_per_hour=5", "--json"]
    by_recipe = json.loads(runner.invoke(app, priced).stdout)["worlds"][0]
    assert by_recipe["cost"] == pytest.approx(5 * by_recipe["hours"])
    by_option = json.loads(runner.invoke(app, [*priced, "--price-per-hour", "7"]).stdout)["worlds"][0]
    assert by_option["cost"] == pytest.approx(7 * by_recipe["hours"])
    told = runner.invoke(app, ["plan", str(path), "--no-measure", "--json"])
    assert told.exit_code == 0
    plan = json.loads(told.stdout)
    assert plan["worlds"][0]["hours"] is None and plan["worlds"][0]["state"]["3"]["weights"] > 0
    assert plan["size"]["parameters"] == model_size(recipe).parameters
    monkeypatch.setattr(run_plan, "step_time", lambda recipe, budget: StepTime(0.25, 4, 2))
    measured = json.loads(runner.invoke(app, ["plan", str(path), "--json"]).stdout)
    assert measured["worlds"][0]["step_seconds"] == 0.25 * 16 and "CPU" in measured["timing"]


WRONG = [
    (["--step-seconds", "0"], "--step-seconds: 0.0 is not above 0"),
    (["--step-seconds", "nan"], "--step-seconds: nan"),
    (["--disk-mb-per-second", "0"], "--disk-mb-per-second: 0.0"),
    (["--price-per-hour", "-3"], "--price-per-hour: -3.0"),
    (["--step-workers", "2"], "--step-workers: 2"),
    (["--step-workers", "17", "--step-seconds", "1"], "--step-workers: 17 is more than train.batch_size: 16"),
    (["--set", "train.stepps=1"], "train.stepps"),
    (["--set", "model.attention={kind: heads, heads: 0}"], "model.attention.heads: 0"),
    (["--set", "model.decoder={patch: 3}"], "model: decoder.patch: 3"),
]


@pytest.mark.parametrize(("words", "says"), WRONG, ids=[words[-1] for words, _ in WRONG])
def test_what_is_wrong_is_a_sentence(words: list[str], says: str, recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(recipe.yaml())
    result = CliRunner().invoke(app, ["plan", str(path), "--no-measure", *words])
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def test_the_plan_in_plain_values_is_json(recipe: Recipe) -> None:
    text = json.dumps(as_json(plan_run(recipe, Assumptions(measure=False))), allow_nan=False)
    assert json.loads(text)["checkpoint_bytes"] == model_size(recipe).checkpoint_bytes


def test_a_page_of_help_imports_nothing_heavy() -> None:
    heavy = "torch ray deepspeed mlflow webdataset numpy scipy PIL pandas pyarrow matplotlib slot_models pipelines"
    program = (
        "import sys; from orchestration.cli import app; app(['--help'], standalone_mode=False); "
        f"print(sorted(set({heavy.split()}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "train" in done.stdout and done.stdout.splitlines()[-1] == "[]"
