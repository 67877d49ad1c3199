"""Recipes: right ones load, wrong ones fail before anything starts, in a sentence that helps."""

import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.recipe import RecipeError, load_recipe
from orchestration.recipe_files import recipe_names
from orchestration.schedule import Schedule

WRONG = [
    ("train.batchsize=3", ["train.batchsize", "3", "'batch_size'"]),
    ("train.batch_size=many", ["train.batch_size", "'many'", "integer"]),
    ("train.batch_size='32'", ["train.batch_size", "'32'", "integer"]),
    ("train.batch_size=0", ["train.batch_size", "0", "greater than 0"]),
    ("train.learning_rate=-1e-3", ["train.learning_rate", "-0.001", "greater than 0"]),
    ("train.keep_weight=.nan", ["train.keep_weight", "nan", "finite"]),
    ("parallel.zero_stage=4", ["parallel.zero_stage", "4", "0, 1, 2 or 3"]),
    ("parallel.workers.max=1", ["parallel.workers.max", "1", "min: 2", "raise max or lower min"]),
    ("parallel.workers={min: 64, max: 64}", ["parallel.workers.min", "64", "32", "raise the batch"]),
    ("data.scenes.pieces=[4, 2]", ["data.scenes.pieces", "[4, 2]", "[fewest, most]"]),
    ("data.scenes=null", ["data", "neither", "give one of the two"]),
    ("data.train=/shards", ["data", "both given", "give one of the two"]),
    ("model.image_size=20", ["model.image_size", "20", "set it to 21"]),
    ("data.scenes={kind: clevr}", ["model.image_size", "21", "set it to 128"]),
    ("data.scenes={kind: clevr, objects: [5, 2]}", ["data.scenes.objects", "[5, 2]", "[fewest, most]"]),
    ("data.scenes={kind: sprites}", ["data.scenes.kind", "'sprites'", "'multi-dsprites'"]),
    ("data.scenes={kind: multi-dsprites, cell: 3}", ["data.scenes.cell:", "3", "coloring"]),
    ("model.gate=null", ["train.keep_weight", "0.", "model.gate: {}"]),
    ("model.encoder={kind: cnn}", ["model.encoder.kind", "'cnn'", "'conv', 'vit'"]),
    ("model.encoder={chanels: 3}", ["model.encoder.chanels:", "3", "'channels'"]),
    ("model.encoder.kernel=0", ["model.encoder.kernel:", "0", "greater than 0"]),
    ("model.decoder={kind: mlp}", ["model.decoder:", "'mlp'", "broadcast or upsampling"]),
    ("model.attention={kind: heads, heads: 2.5}", ["model.attention.heads:", "2.5", "integer"]),
    ("model.codebook={}", ["model.codebook:", "gate", "null"]),
    ("train.steps=10", ["train.decay_steps", "more than train.steps: 10", "lower it or train longer"]),
    ("train.random_from=5000", ["train.random_from", "5000", "after train.gate_from", "set null"]),
    ("train.gate_from=100000", ["train.gate_from", "100000", "lower it"]),
    ("evaluate.background_slots=9", ["evaluate.background_slots", "9", "lower it"]),
    ("registry.floors={fg_ari: 2}", ["registry.floors.fg_ari", "2", "less than or equal to 1"]),
    ("registry.floors={iou: 0.5}", ["registry.floors.iou", "fg_ari"]),
    ("name=../escape", ["name", "'../escape'"]),
    ("sead=1", ["sead", "'seed'"]),
    ("train.batch_size", ["--set train.batch_size", "section.field=value"]),
    ("train.batch_size.x=1", ["batch_size", "not a section"]),
]


@pytest.mark.parametrize(("override", "expected"), WRONG, ids=[override for override, _ in WRONG])
def test_a_wrong_field_is_one_sentence_with_path_value_and_cure(override: str, expected: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", [override])
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(part in sentence for part in expected), sentence


def test_every_wrong_field_has_a_sentence_of_its_own() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", ["train.batch_size=0", "seed=-1"])
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["seed", "train.batch_size"]


def test_a_recipe_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'nope'.*demo.*tetrominoes"):
        load_recipe("nope")
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [")
    with pytest.raises(RecipeError, match=r"broken.yaml: this is not YAML"):
        load_recipe(str(broken))


def test_the_entry_point_exits_with_2_before_anything_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orchestration.train", "--recipe", "demo", "--set", "model.encoder.strides=[2]"]
    done = subprocess.run(command, capture_output=True, text=True, env={"SLOTFORGE_HOME": str(tmp_path)})
    assert done.returncode == 2
    assert "model: strides: 2 does not divide the size 21" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_project_is_right(name: str) -> None:
    assert load_recipe(name).name == name


def test_a_yaml_file_says_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {train: /a, eval: /b}\ntrain: {learning_rate: 4e-4}\n")
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.train.learning_rate) == ("mine", 4e-4)


def test_a_run_stays_the_same_run_wherever_and_however_it_computes() -> None:
    digest = load_recipe("demo").digest()
    same = ["parallel.zero_stage=3", "parallel.workers={min: 1, max: 5}", "tracking.every=1", "registry.floors={}"]
    same += ["train.micro_batch=3", "train.checkpoint_every=7", "evaluate.batch_size=9", "data.bad_samples=0"]
    assert all(load_recipe("demo", [override]).digest() == digest for override in same)
    others = ["seed=1", "train.steps=99999", "model.slot_dim=48", "data.window=3", "evaluate.every=7"]
    assert len({digest, *(load_recipe("demo", [override]).digest() for override in others)}) == 1 + len(others)


def test_the_published_schedule() -> None:
    """lr = 4e-4 * min(1, step / 10_000) * 0.5 ** (step / 100_000) (Locatello et al. 2020, appendix E.1)."""
    schedule = Schedule(load_recipe("tetrominoes").train)
    assert schedule.steps == 500_000
    for step in (99, 4_999, 9_999, 10_000, 100_000, 499_999):
        published = 4e-4 * min(1, (step + 1) / 10_000) * 0.5 ** (step / 100_000)
        assert schedule.learning_rate(step) == pytest.approx(published, rel=1e-12)


def test_the_gate_and_its_penalty_start_when_the_recipe_says() -> None:
    fields = {"steps": 2100, "random_from": 40, "gate_from": 100, "keep_weight": 0.2, "keep_weight_end": 0.1}
    fields["decay_steps"] = 1000
    schedule = Schedule(load_recipe("demo", [f"train.{name}={value}" for name, value in fields.items()]).train)
    stages = ["open", "open", "random", "random", "deciding"]
    assert [schedule.stage(step) for step in (0, 39, 40, 99, 100)] == stages
    weights = [schedule.keep_weight(step) for step in (99, 100, 1100, 2100)]
    assert weights == pytest.approx([0, 0.2, 0.15, 0.1])
    assert schedule.learning_rate(schedule.steps - 1) == pytest.approx(schedule.learning_rate(1000) / 1000)


def test_the_temperature_falls_by_equal_factors_once_the_gate_decides() -> None:
    fields = {"steps": 1100, "decay_steps": 0, "random_from": 40, "gate_from": 100, "temperature": 2.0}
    fixed, falling = (
        Schedule(load_recipe("demo", [f"train.{name}={value}" for name, value in (fields | end).items()]).train)
        for end in ({}, {"temperature_end": 0.02})
    )
    assert {fixed.temperature(step) for step in range(0, 1100, 50)} == {2.0}
    assert [falling.temperature(step) for step in (0, 100, 600, 1100)] == pytest.approx([2.0, 2.0, 0.2, 0.02])
