"""Checkpoints: whole or not there, and damage is seen; on a disk and on object storage."""

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orchestration.assembly import Data, build_model, training_stream
from orchestration.engine import PlainEngine
from orchestration.recipe import Recipe, parse_recipe
from orchestration.runs.checkpoints import (
    Checkpoint,
    DamagedCheckpointError,
    best,
    committed,
    newest_valid,
    prune,
    restore,
)
from orchestration.runs.saver import Saver, new_token
from orchestration.runs.storage import LocalStorage, Storage, storage_at, to_json
from orchestration.schedule import Schedule
from orchestration.worker import StepReport, train


def with_codebook(recipe: Recipe) -> Recipe:
    """Heads and a codebook instead of the gate; the codebook prunes from step 3."""
    fields = recipe.model_dump(mode="json")
    fields["model"] |= {"gate": None, "codebook": {"size": 8, "commitment": 0.1}}
    fields["model"]["attention"] = {"kind": "heads", "heads": 2, "dim_head": 8, "gradient": "bilevel"}
    fields["train"]["keep_weight"] = 0
    return parse_recipe(fields)


def trained(recipe: Recipe, data: Data, folder: Storage) -> tuple[PlainEngine, list[StepReport]]:
    """Twelve steps with a checkpoint every four."""
    engine, reports = PlainEngine(build_model(recipe)), []
    saver = Saver(folder, new_token(), 0, 1, allowed=lambda: None)

    def save(report: StepReport) -> None:
        reports.append(report)
        if report.done % 4 == 0:
            saver.save(report.done, engine, [("loss", 1.0, report.done, report.done)], {"steps": report.done})

    with training_stream(recipe, data.train, build_model(recipe).noise_shapes()) as stream:
        train(engine, stream, Schedule(recipe.train), hooks=[save])
    saver.wait(must=True)
    return engine, reports


def copied(source: Storage, target: Storage) -> None:
    for file in source.files():
        target.write(file.name, source.read(file.name))


@pytest.fixture(scope="module")
def made(recipe: Recipe, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    folder = LocalStorage(tmp_path_factory.mktemp("made"))
    trained(recipe, data, folder)
    return folder


@pytest.fixture
def folder(made: Storage, storage: Storage) -> Storage:
    """Checkpoints of steps 4, 8 and 12."""
    copied(made, storage)
    return storage


@pytest.mark.parametrize("variant", ["gate", "codebook"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(
    recipe: Recipe, data: Data, storage: Storage, variant: str
) -> None:
    if variant == "codebook":
        recipe = with_codebook(recipe)
    unbroken, reports = trained(recipe, data, storage)
    assert [checkpoint.steps for checkpoint in committed(storage)] == [4, 8, 12]
    module, again = build_model(recipe), []
    moments = restore(committed(storage)[0], module)
    engine = PlainEngine(module)
    engine.load_moments(moments, 4)
    with training_stream(recipe, data.train, build_model(recipe).noise_shapes()) as stream:
        train(engine, stream, Schedule(recipe.train), start=4, hooks=[again.append])
    assert [report.step for report in again] == list(range(4, 12))
    assert all(torch.equal(a.means, b.means) for a, b in zip(again, reports[4:], strict=True))
    states = dict(engine.named_state(owned=False)), dict(unbroken.named_state(owned=False))
    for name, state in states[0].items():
        assert all(torch.equal(state[kind], states[1][name][kind]) for kind in state), name


def test_a_checkpoint_keeps_the_codebook(recipe: Recipe, data: Data, tmp_path: Path) -> None:
    recipe, storage = with_codebook(recipe), LocalStorage(tmp_path)
    trained(recipe, data, storage)
    fresh = build_model(recipe).state_dict()
    saved = [checkpoint.weights() for checkpoint in committed(storage)]
    name = "slot_attention.codebook.codes"
    assert all(weights.keys() == fresh.keys() for weights in saved)
    assert all(not torch.equal(a[name], b[name]) for a, b in itertools.pairwise([fresh, *saved]))


def cut(content: bytes) -> bytes:
    return content[:-10]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("part-00000.safetensors", cut),
        ("part-00000.safetensors", flip),
        ("part-00000.safetensors", None),
        ("curve.json", flip),
        ("manifest.json", cut),
        ("manifest.json", lambda _: b"[]"),
        ("manifest.json", lambda _: b""),
    ],
)
def test_a_damaged_checkpoint_is_put_aside_with_a_warning(
    folder: Storage, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[bytes], bytes] | None
) -> None:
    newest = committed(folder)[-1]
    if damage is None:
        newest.files.delete(name)
    else:
        newest.files.write(name, damage(newest.files.read(name)))
    with caplog.at_level(logging.WARNING):
        found = newest_valid(folder)
    assert found is not None
    assert found.steps == 8
    assert "damaged checkpoint" in caplog.text
    assert newest.name in caplog.text
    assert [checkpoint.steps for checkpoint in committed(folder)] == [4, 8]
    aside = Checkpoint(folder, f"damaged-{newest.name}")
    assert aside.files.files() != []
    with pytest.raises(DamagedCheckpointError, match=aside.url):
        aside.validate()


def test_storage_that_does_not_answer_is_no_damage(folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "open", down)
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):
            newest_valid(folder)
    assert [checkpoint.steps for checkpoint in committed(folder)] == [4, 8, 12]


def test_without_a_manifest_there_is_no_checkpoint(folder: Storage) -> None:
    folder.delete(f"{committed(folder)[-1].name}/manifest.json")
    found = newest_valid(folder)
    assert found is not None
    assert found.steps == 8
    assert newest_valid(folder / "nowhere") is None


def all_sent(folder: Storage) -> set[str]:
    return {checkpoint.name for checkpoint in committed(folder)}


def test_pruning_keeps_the_newest_and_clears_what_was_never_committed(folder: Storage) -> None:
    folder.write("000000006-dead/part-00000.safetensors", b"")
    folder.write("000000006-gone/.0123.partial", b"")
    folder.write("000000016-busy/part-00000.safetensors", b"")  # being written
    folder.write("damaged-000000002-a/manifest.json", b"")
    prune(folder, keep=2, sent=set())
    assert [checkpoint.steps for checkpoint in committed(folder)] == [4, 8, 12]  # no point of theirs has arrived
    prune(folder, keep=2, sent=all_sent(folder))
    assert [checkpoint.steps for checkpoint in committed(folder)] == [8, 12]
    left = {file.name.partition("/")[0] for file in folder.files()} - {one.name for one in committed(folder)}
    assert left == {"000000016-busy", "damaged-000000002-a"}


def evaluated(folder: Storage, steps: int, evaluation: dict[str, float] | None) -> None:
    facts = {"steps": steps, "files": {}} | ({"eval": evaluation} if evaluation is not None else {})
    folder.write(f"{steps:09d}-a/manifest.json", to_json(facts))


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({1: 0.2, 2: 0.9, 3: None, 4: 0.3, 5: 0.4}, 2),
        ({1: 0.9, 2: float("nan"), 3: 0.1, 4: 0.9, 5: None}, 4),
        ({1: None, 2: None, 3: None, 4: None, 5: None}, None),
        ({1: float("nan"), 2: None, 3: None, 4: None, 5: None}, None),
    ],
)
def test_pruning_keeps_the_best(storage: Storage, measured: dict[int, float | None], expected: int | None) -> None:
    """By fg_ari, whatever the reconstruction is; without true masks by the reconstruction error."""
    for kind, metrics in (
        ("ari", lambda value: {"reconstruction": value, "fg_ari": value}),
        ("error", lambda value: {"reconstruction": -value}),
    ):
        folder = storage / kind
        for steps, value in measured.items():
            evaluated(folder, steps, None if value is None else metrics(value))
        found = best(committed(folder))
        assert (found and found.steps) == expected
        prune(folder, keep=1, sent=all_sent(folder))
        kept = [checkpoint.steps for checkpoint in committed(folder)]
        assert kept == sorted({5} | ({expected} if expected else set()))
        evaluated(folder, 6, metrics(1.0))  # a better one takes its place
        prune(folder, keep=1, sent=all_sent(folder))
        assert [checkpoint.steps for checkpoint in committed(folder)] == [6]


def test_the_best_is_by_the_metric_that_the_registry_goes_by(storage: Storage) -> None:
    for steps, error in ((1, 0.5), (2, 0.1), (3, 0.3)):
        evaluated(storage, steps, {"fg_ari": error, "reconstruction": steps, "count_error": error, "miou": -error})
    found = {metric: best(committed(storage), metric) for metric in (None, "count_error", "miou", "unknown")}
    assert {metric: one and one.steps for metric, one in found.items()} == {
        None: 1,
        "count_error": 2,
        "miou": 2,
        "unknown": None,
    }


def test_nothing_in_a_checkpoint_is_executable(made: Storage) -> None:
    for file in made.files():
        assert file.name.endswith((".json", ".safetensors"))
        if file.name.endswith(".json"):
            json.loads(made.read(file.name))


def test_another_models_checkpoint_is_refused(recipe: Recipe, made: Storage) -> None:
    fixed = build_model(recipe.model_copy(update={"model": recipe.model.model_copy(update={"gate": None})}))
    with pytest.raises(DamagedCheckpointError, match="parameters differ"):
        restore(committed(made)[0], fixed)


def test_a_checkpoint_is_known_by_its_address(folder: Storage) -> None:
    """Rank 0 finds it, the others open it."""
    found = newest_valid(folder)
    assert found is not None
    there = Checkpoint(storage_at(folder.url), found.name)
    assert there.weights().keys() == found.weights().keys()
    assert there.points() == [("loss", 1.0, 12, 12)]
