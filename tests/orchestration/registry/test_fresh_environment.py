"""A registered model in an environment that has its requirements and nothing of this repository."""

import importlib.metadata
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from registering import IMAGES, expected, finish, uri_of, worsened

from orchestration.assembly import Data
from orchestration.recipe import Recipe
from orchestration.registry.export import export

pytestmark = pytest.mark.slow

PREDICT = """
import importlib.util, sys
import numpy as np
uri, model, images, out = sys.argv[1:]
absent = ("orchestration", "pipelines", "slot_models", "ray", "deepspeed", "webdataset")
found = [name for name in absent if importlib.util.find_spec(name)]
assert not found, found
import mlflow
mlflow.set_tracking_uri(uri)
loaded = mlflow.pyfunc.load_model(model)
given = np.load(images)
np.savez(out, **loaded.predict(given))
import slot_models, torch
assert "code" in slot_models.__file__, slot_models.__file__
with torch.inference_mode():
    module = loaded.unwrap_python_model().finder(torch.from_numpy(given))
assert all(np.array_equal(module[name].numpy(), value) for name, value in np.load(out).items())
"""

RUN_PROGRAM = """
import importlib.util, sys
import numpy as np, torch
assert not importlib.util.find_spec("slot_models")
program = torch.export.load(sys.argv[1]).module()
found = program(torch.from_numpy(np.load(sys.argv[2])))
np.savez(sys.argv[3], **{name: value.numpy() for name, value in found.items()})
"""


def closure(requirements: list[str]) -> set[str]:
    """The distributions that an installer would put there, by their own metadata; all are installed here."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        distribution = importlib.metadata.distribution(wanted.name)
        assert wanted.specifier.contains(distribution.version.partition("+")[0], prereleases=True), wanted
        if (key := (wanted.name.lower(), frozenset(wanted.extras))) in found:
            continue
        found.add(key)
        for line in distribution.requires or []:
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                waiting.append(inner)
    return {name for name, _ in found}


def fresh_environment(folder: Path, requirements: list[str]) -> Path:
    """A virtual environment that holds these requirements, theirs, and nothing else; linked, not copied.

    Returns:
        Its interpreter.
    """
    venv.create(folder, with_pip=False)
    site = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for name in sorted(closure(requirements)):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}:
            source, target = Path(str(distribution.locate_file(top))), site / top
            if source.exists() and not target.exists() and source.suffix != ".pth":
                target.symlink_to(source)
    return folder / "bin" / "python"


def run(python: Path, program: str, *arguments: object) -> None:
    command = [str(python), "-I", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr


def test_it_loads_and_gives_the_same_bits(recipe: Recipe, data: Data, home: Path, tmp_path: Path) -> None:
    trained = worsened(recipe, 0.0)
    uri = finish(recipe, "fresh", data, trained).uri
    (listed,) = (home / "mlflow-artifacts").rglob("requirements.txt")
    python = fresh_environment(tmp_path / "fresh", listed.read_text().split())
    np.save(tmp_path / "images.npy", IMAGES)
    run(python, PREDICT, uri_of(home), uri, tmp_path / "images.npy", tmp_path / "found.npz")
    wanted = expected(trained, IMAGES)
    with np.load(tmp_path / "found.npz") as found:
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value.numpy())


def test_an_exported_program_needs_torch_and_numpy_alone(recipe: Recipe, data: Data, tmp_path: Path) -> None:
    trained = worsened(recipe, 0.0)
    export(trained.finder(), tmp_path / "model.pt2")
    python = fresh_environment(tmp_path / "fresh", ["torch", "numpy"])
    np.save(tmp_path / "images.npy", IMAGES)
    run(python, RUN_PROGRAM, tmp_path / "model.pt2", tmp_path / "images.npy", tmp_path / "found.npz")
    with np.load(tmp_path / "found.npz") as found:
        for name, value in expected(trained, IMAGES).items():
            np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-5, atol=1e-6)
