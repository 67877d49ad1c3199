"""Checkpoints: whole or not there, and damage is seen."""

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch

from orchestration.assembly import Data, build_model, training_stream
from orchestration.checkpoints import (
    Checkpoint,
    DamagedCheckpointError,
    Saver,
    committed,
    new_token,
    newest_valid,
    prune,
    restore,
)
from orchestration.engine import PlainEngine
from orchestration.recipe import Recipe, parse_recipe
from orchestration.run_folder import LeaseLostError
from orchestration.schedule import Schedule
from orchestration.worker import DivergedError, StepReport, train


def with_codebook(recipe: Recipe) -> Recipe:
    """Heads and a codebook instead of the gate; the codebook prunes from step 3."""
    fields = recipe.model_dump(mode="json")
    fields["model"] |= {"gate": None, "codebook": {"size": 8, "commitment": 0.1}}
    fields["model"]["attention"] = {"kind": "heads", "heads": 2, "dim_head": 8, "gradient": "bilevel"}
    fields["train"]["keep_weight"] = 0
    return parse_recipe(fields)


def trained(recipe: Recipe, data: Data, folder: Path) -> tuple[PlainEngine, list[StepReport]]:
    """Twelve steps with a checkpoint every four."""
    engine, reports = PlainEngine(build_model(recipe)), []
    saver = Saver(folder, new_token(), 0, 1, allowed=lambda: None)

    def save(report: StepReport) -> None:
        reports.append(report)
        if report.done % 4 == 0:
            saver.save(report.done, engine, [("loss", 1.0, report.done, report.done)], {"steps": report.done})

    with training_stream(recipe, data.train, build_model(recipe).noise_shapes()) as stream:
        train(engine, stream, Schedule(recipe.train), hooks=[save])
    saver.wait()
    return engine, reports


@pytest.mark.parametrize("variant", ["gate", "codebook"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(recipe: Recipe, data: Data, tmp_path: Path, variant: str) -> None:
    if variant == "codebook":
        recipe = with_codebook(recipe)
    unbroken, reports = trained(recipe, data, tmp_path)
    assert [checkpoint.steps for checkpoint in committed(tmp_path)] == [4, 8, 12]
    module, again = build_model(recipe), []
    moments = restore(committed(tmp_path)[0], module)
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
    recipe = with_codebook(recipe)
    trained(recipe, data, tmp_path)
    fresh = build_model(recipe).state_dict()
    saved = [checkpoint.weights() for checkpoint in committed(tmp_path)]
    name = "slot_attention.codebook.codes"
    assert all(weights.keys() == fresh.keys() for weights in saved)
    assert all(not torch.equal(a[name], b[name]) for a, b in itertools.pairwise([fresh, *saved]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("part-00000.safetensors", cut),
        ("part-00000.safetensors", flip),
        ("part-00000.safetensors", Path.unlink),
        ("curve.json", flip),
        ("manifest.json", cut),
        ("manifest.json", lambda path: path.write_text("[]")),
    ],
)
def test_a_damaged_checkpoint_is_put_aside_with_a_warning(
    recipe: Recipe, data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: object
) -> None:
    trained(recipe, data, tmp_path)
    newest = committed(tmp_path)[-1].path
    damage(newest / name)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        found = newest_valid(tmp_path)
    assert found is not None
    assert found.steps == 8
    assert "damaged checkpoint" in caplog.text
    assert newest.name in caplog.text
    assert [checkpoint.steps for checkpoint in committed(tmp_path)] == [4, 8]
    with pytest.raises(DamagedCheckpointError, match=str(tmp_path)):
        Checkpoint(newest.with_name(f"damaged-{newest.name}")).validate()


def test_without_a_manifest_there_is_no_checkpoint(recipe: Recipe, data: Data, tmp_path: Path) -> None:
    trained(recipe, data, tmp_path)
    (committed(tmp_path)[-1].path / "manifest.json").unlink()
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.steps == 8


def test_a_driver_that_was_succeeded_commits_nothing(recipe: Recipe, tmp_path: Path) -> None:
    def succeeded() -> None:
        raise LeaseLostError("driver 2 has taken over")

    saver = Saver(tmp_path, new_token(), 0, 1, allowed=succeeded)
    saver.save(4, PlainEngine(build_model(recipe)), [], {})
    with pytest.raises(LeaseLostError):
        saver.wait()
    assert committed(tmp_path) == []


def test_a_write_that_fails_is_raised_in_the_training_thread(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    saver = Saver(tmp_path / "file", new_token(), 0, 1, allowed=lambda: None)
    saver.save(4, PlainEngine(build_model(recipe)), [], {})
    with pytest.raises(OSError, match="file"):
        saver.wait()


def test_parts_of_several_ranks_make_one_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    """Rank 0 commits only when every part is there."""
    engine = PlainEngine(build_model(recipe))
    token = new_token()
    savers = [Saver(tmp_path, token, rank, 2, allowed=lambda: None) for rank in range(2)]
    savers[0].save(4, engine, [], {})
    assert committed(tmp_path) == []
    savers[1].save(4, engine, [], {})
    for saver in savers:
        saver.wait()
    assert sorted(committed(tmp_path)[0].manifest()["files"]) == [
        "curve.json",
        "part-00000.safetensors",
        "part-00001.safetensors",
    ]


def test_pruning_keeps_the_newest_and_clears_what_was_never_committed(
    recipe: Recipe, data: Data, tmp_path: Path
) -> None:
    trained(recipe, data, tmp_path)
    (tmp_path / "000000006-dead").mkdir()
    (tmp_path / "000000016-busy").mkdir()  # being written
    prune(tmp_path, keep=2, sent=set())
    assert [checkpoint.steps for checkpoint in committed(tmp_path)] == [4, 8, 12]  # no point of theirs has arrived
    prune(tmp_path, keep=2, sent={checkpoint.path.name for checkpoint in committed(tmp_path)})
    assert [checkpoint.steps for checkpoint in committed(tmp_path)] == [8, 12]
    assert not (tmp_path / "000000006-dead").exists()
    assert (tmp_path / "000000016-busy").exists()


def test_nothing_in_a_checkpoint_is_executable(recipe: Recipe, data: Data, tmp_path: Path) -> None:
    trained(recipe, data, tmp_path)
    for path in committed(tmp_path)[0].path.iterdir():
        assert path.suffix in {".json", ".safetensors"}
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_another_models_checkpoint_is_refused(recipe: Recipe, data: Data, tmp_path: Path) -> None:
    trained(recipe, data, tmp_path)
    fixed = build_model(recipe.model_copy(update={"model": recipe.model.model_copy(update={"gate": None})}))
    with pytest.raises(DamagedCheckpointError, match="parameters differ"):
        restore(committed(tmp_path)[0], fixed)


def test_a_state_that_is_not_finite_is_never_written(recipe: Recipe, tmp_path: Path) -> None:
    """The loss before an update may be finite, and the weights after it not."""
    engine = PlainEngine(build_model(recipe))
    with torch.no_grad():
        next(engine.module.parameters()).flatten()[0] = torch.nan
    saver = Saver(tmp_path, new_token(), 0, 1, allowed=lambda: None)
    saver.save(4, engine, [], {})
    with pytest.raises(DivergedError, match=r"weight/.* is not finite after step 4"):
        saver.wait()
    assert committed(tmp_path) == []
