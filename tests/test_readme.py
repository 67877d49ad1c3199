"""What README shows runs as it stands there."""

import doctest
import re
from pathlib import Path

import pytest
import torch

from orchestration.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def test_the_library_examples_give_what_they_say() -> None:
    example = doctest.DocTestParser().get_doctest(block("python"), {}, "README", "README.md", 0)
    assert len(example.examples) >= 10
    results = doctest.DocTestRunner().run(example, clear_globs=False)
    assert results.failed == 0
    keep = example.globs["keep"]
    assert keep.requires_grad and set(keep.unique().tolist()) <= {0.0, 1.0}


def test_the_recipe_for_ones_own_images_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slot_models import build_autoencoder

    path = tmp_path / "mine.yaml"
    path.write_text(block("yaml"))
    recipe = load_recipe(str(path))
    assert recipe.registered_model == "slotforge-mine"
    output = build_autoencoder(**recipe.model.model_dump())(torch.zeros(1, 3, 64, 64))
    assert output.reconstruction.shape == (1, 3, 64, 64)


def test_every_file_and_folder_that_is_named_is_there() -> None:
    linked = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"^\| `([a-z_]+/)`", README, flags=re.MULTILINE)
    assert len(linked) >= 8
    assert [name for name in linked if not (ROOT / name).exists()] == []
