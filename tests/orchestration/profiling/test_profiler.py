"""The profile of a bare run: nothing of the run changes, and all of its time is told."""

import gzip
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from orchestration.assembly import Data, build_model, training_stream
from orchestration.bare import train_bare
from orchestration.engine import PlainEngine
from orchestration.profiling.profile import PARTS, TRACED_STEPS, WARM_STEPS, StepProfile
from orchestration.profiling.profiler import Profiler
from orchestration.profiling.show import Wish, profile_table, write_trace
from orchestration.recipe import Recipe, RecipeError
from orchestration.schedule import Schedule
from orchestration.worker import StepReport, train

SLEEP = 0.02


def profiled(recipe: Recipe, data: Data, trace: bool = False) -> tuple[Profiler, list[StepReport], float]:
    """The run's profiler and reports, and the seconds of the steps that count."""
    model, reports, ends = build_model(recipe), [], []

    def slow(report: StepReport) -> None:
        reports.append(report)
        time.sleep(SLEEP)

    with Profiler("cpu", trace=trace) as profiler, training_stream(recipe, data.train, model.noise_shapes()) as stream:
        hooks = [("checkpoint", slow)]
        engine, batches, timed = profiler.around(PlainEngine(model), stream, hooks)
        timed.append(lambda report: ends.append(time.perf_counter()))
        train(engine, batches, Schedule(recipe.train), hooks=timed)
    return profiler, reports, ends[-1] - ends[min(len(ends), WARM_STEPS) - 1]


def test_a_profile_accounts_for_all_the_time_and_changes_nothing(recipe: Recipe, data: Data) -> None:
    bare: list[StepReport] = []
    train_bare(recipe, data, hooks=(bare.append,))
    profiler, reports, seconds = profiled(recipe, data)
    profile = profiler.profile()
    assert [report.means.tolist() for report in reports] == [report.means.tolist() for report in bare]
    assert profile.steps == recipe.train.steps - WARM_STEPS
    assert profile.images == sum(report.batch_size for report in reports[WARM_STEPS:])
    assert profile.step_seconds * profile.steps == pytest.approx(seconds, rel=0.05)
    assert profile.seconds["checkpoint"] >= SLEEP
    assert set(profile.seconds) == set(PARTS)
    worked = ("forward", "backward", "optimizer", "data wait", "host to device", "other")
    assert all(profile.seconds[part] > 0 for part in worked)
    assert profile.seconds["communication"] == profile.traffic.calls == 0


def test_points_are_of_the_steps_since_the_last_ones(recipe: Recipe, data: Data) -> None:
    profiler, _, _ = profiled(recipe, data)
    points = profiler.points()
    assert points["profile/checkpoint_ms"] >= 1e3 * SLEEP
    whole = 1e3 * profiler.profile().step_seconds
    assert sum(value for name, value in points.items() if name.endswith("_ms")) == pytest.approx(whole)
    assert profiler.points() == {}


def test_collectives_are_unwatched_again(recipe: Recipe) -> None:
    before: Any = torch.distributed.all_reduce
    with Profiler("cpu"):
        assert torch.distributed.all_reduce is not before
    assert torch.distributed.all_reduce is before


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_holds_the_parts_of_a_few_steps(recipe: Recipe, data: Data, tmp_path: Path, name: str) -> None:
    profiler, _, _ = profiled(recipe, data, trace=True)
    content = profiler.trace()
    assert content is not None
    write_trace(content, tmp_path / name)
    written = (tmp_path / name).read_bytes()
    events = json.loads(gzip.decompress(written) if name.endswith(".gz") else written)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for part in ("forward", "backward", "optimizer", "checkpoint", "data wait"):
        assert names.count(part) == TRACED_STEPS, part
    assert any(event["name"] == "aten::convolution" for event in events)


def test_a_run_that_is_too_short_has_no_trace(recipe: Recipe, data: Data) -> None:
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 4, "gate_from": 0})})
    assert profiled(short, data, trace=True)[0].trace() is None


def test_the_table_tells_every_part(recipe: Recipe, data: Data) -> None:
    profiler, _, _ = profiled(recipe, data)
    profile: StepProfile = profiler.profile()
    out = io.StringIO()
    Console(file=out, width=100).print(profile_table(profile))
    shares = [float(word[:-1]) for word in out.getvalue().split() if word.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(PARTS))
    assert f"{profile.images / profile.steps / profile.step_seconds:.1f} images/s" in out.getvalue()


def test_a_trace_wants_a_file_in_a_folder(tmp_path: Path) -> None:
    Wish(tmp_path / "trace.json")
    for wrong in (tmp_path, tmp_path / "nowhere" / "trace.json"):
        with pytest.raises(RecipeError, match=r"--trace: .* is no file"):
            Wish(wrong)
