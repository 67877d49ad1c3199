"""Where a run comes from, as its page in MLflow tells it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestration.assembly import Data
from orchestration.flops import Flops, peak_flops, training_flops
from orchestration.planning.measure import model_size
from orchestration.prepare import check_data, data_folders
from orchestration.recipe import Recipe, parse_recipe
from orchestration.runs.folder import RunFolder
from orchestration.tracking import Tracker
from orchestration.tracking.estimate import Estimate, estimate
from orchestration.tracking.provenance import Provenance, code, packages


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for package in ("orchestration", "pipelines", "slot_models"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f'"""{package}."""\n')
    return tmp_path


def git(folder: Path, *words: str) -> str:
    options = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    return subprocess.run(["git", "-C", folder, *options, *words], check=True, capture_output=True, text=True).stdout


def test_code_is_known_by_its_commit_and_by_its_sources(sources: Path) -> None:
    without = code(sources)
    assert without.commit is None and not without.dirty
    git(sources, "init", "-q")
    git(sources, "add", ".")
    git(sources, "commit", "-q", "-m", "first")
    clean = code(sources)
    assert clean.commit == git(sources, "rev-parse", "HEAD").strip() and not clean.dirty
    assert clean.digest == without.digest
    (sources / "notes.txt").write_text("of no consequence")
    assert code(sources) == clean
    (sources / "pipelines" / "__init__.py").write_text("x = 1\n")
    changed = code(sources)
    assert changed.dirty and changed.commit == clean.commit and changed.digest != clean.digest
    assert "with changes" in str(changed)


def test_code_in_somebody_elses_repository_has_no_commit(sources: Path) -> None:
    """As an installed package has not, in a virtual environment inside another project."""
    git(sources, "init", "-q")
    (sources / "theirs.txt").write_text("theirs")
    git(sources, "add", "theirs.txt")
    git(sources, "commit", "-q", "-m", "theirs")
    assert code(sources).commit is None


def test_packages_are_named_as_pip_takes_them() -> None:
    assert f"torch=={torch.__version__}\n" in packages()


def test_a_page_tells_code_packages_data_and_machines(
    recipe: Recipe, data: Data, home: Path, tmp_path: Path, sources: Path
) -> None:
    fields = recipe.model_dump(mode="json") | {"data": {"train": str(data.train), "eval": str(data.eval)}}
    mine = parse_recipe(fields)
    digests = check_data(mine)
    folder = RunFolder.of(mine)
    folder.claim(mine)
    folder.note(data=digests)
    tracker = Tracker(mine, folder)
    provenance = Provenance(mine, digests, code(sources))
    provenance.runs_on([{"address": "10.0.0.1", "CPU": 2.0}])
    for _ in range(2):  # and a later driver
        provenance.deliver(tracker)
        Provenance(mine, digests, code(sources)).deliver(tracker)

    run = tracker.client.get_run(tracker.run_id)
    inputs = {entry.dataset.name: entry for entry in run.inputs.dataset_inputs}
    assert set(inputs) == {"train", "eval"} and len(run.inputs.dataset_inputs) == 2
    assert digests["train"].startswith(inputs["train"].dataset.digest)
    assert json.loads(inputs["train"].dataset.profile)["images"] == 200
    assert json.loads(inputs["eval"].dataset.source) == {"urls": [str(data_folders(mine).eval)]}
    assert {tag.key: tag.value for tag in inputs["eval"].tags} == {"mlflow.data.context": "evaluation"}
    found = {entry.path for entry in tracker.client.list_artifacts(tracker.run_id, "provenance")}
    assert found == {"provenance/packages.txt", "provenance/facts.json"}


def test_the_estimate_is_that_of_the_plan_by_the_steps_of_the_run(recipe: Recipe) -> None:
    """Without failures or checkpoints to speak of, a run takes its steps' time."""
    calm = recipe.model_copy(update={"train": recipe.train.model_copy(update={"mtbf_hours": 1e9, "steps": 7200})})
    plan = estimate(calm, model_size(calm), step_seconds=0.5, workers=3)
    assert plan.hours == pytest.approx(1.0, rel=1e-3)
    assert plan.step_seconds == pytest.approx(0.5)
    often = recipe.model_copy(update={"train": recipe.train.model_copy(update={"mtbf_hours": 0.1, "steps": 7200})})
    assert (estimate(often, model_size(often), 0.5, 3).hours or 0) > 1.05


@pytest.mark.parametrize("price", [None, 0.0, 2.5])
def test_the_estimate_is_told_once_there_are_steps(recipe: Recipe, price: float | None) -> None:
    class FakeTracker:
        run_id = "run"

        def __init__(self) -> None:
            self.client, self.seconds = self, [0.1, 0.2]
            self.told: list[tuple[str, Any]] = []

        def sent(self, name: str) -> int:
            return len(self.seconds)

        def points(self, name: str) -> list[tuple[int, float]]:
            return list(enumerate(self.seconds if name == "time/step" else [2.0]))

        def log_dict(self, run_id: str, content: Any, path: str) -> None:
            self.told.append((path, content))

        def tag(self, **tags: str) -> None:
            self.told.append(("tags", tags))

    tracker: Any = FakeTracker()
    priced = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"price_per_hour": price})})
    cargo = Estimate(priced)
    cargo.deliver(tracker)
    assert tracker.told == []
    tracker.seconds += [0.2, 0.9]
    cargo.deliver(tracker)
    cargo.deliver(tracker)
    (path, content), (_, tags) = tracker.told
    assert path == "provenance/estimate.json" and content["measured_step_seconds"] == pytest.approx(0.2)
    assert float(tags["estimate.worker_hours"]) == pytest.approx(2 * float(tags["estimate.hours"]), rel=0.01)
    assert content["price_per_hour"] == price and ("estimate.cost" in tags) == (price is not None)
    if price is None:
        assert content["cost"] is None
    else:
        assert content["cost"] == pytest.approx(2 * content["hours"] * price)
        assert float(tags["estimate.cost"]) == pytest.approx(float(tags["estimate.worker_hours"]) * price, rel=0.01)


def test_convolutions_cost_what_their_sums_cost(recipe: Recipe) -> None:
    """Larger kernels cost two operations a tap, position and pair of channels: forward, for the weights' gradient, and
    for the inputs' gradient in all layers but the first."""

    def flops(kernel: int) -> float:
        fields = recipe.model_dump(mode="json")
        fields["model"]["encoder"] |= {"channels": 8, "strides": [1, 1, 1], "kernel": kernel}
        return training_flops(parse_recipe(fields))

    taps, positions = 5**2 - 3**2, 10 * 10
    assert flops(5) - flops(3) == 2 * taps * positions * (2 * 3 * 8 + 3 * 8 * 8 + 3 * 8 * 8)


def test_rates_are_shares_of_the_peak() -> None:
    rates = Flops(image=2e9, peak=1e12).rates(images_per_second=100)
    assert rates == {"throughput/tflops_per_gpu": pytest.approx(0.2), "throughput/mfu": pytest.approx(0.2)}
    assert set(Flops(2e9, None).rates(100)) == {"throughput/tflops_per_gpu"}
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("Some other GPU") is None
