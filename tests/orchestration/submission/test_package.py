"""What travels to a cluster is what a job needs, and too much is refused before it is sent."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from orchestration.recipe import RecipeError, load_recipe
from orchestration.submission import package
from orchestration.submission.job import check_places
from orchestration.submission.package import PackageError, pack, project_root


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A clone with what lies about in one."""
    root = tmp_path / "clone"
    for name in (
        "orchestration/train.py",
        "orchestration/__pycache__/train.cpython-311.pyc",
        "orchestration/.secret",
        "orchestration/notes.scratch",
        "pipelines/a.py",
        "slot_models/b.py",
        "slot_models/torch.whl",
        "recipes/demo.yaml",
        "pyproject.toml",
        "README.md",
        ".venv/lib/big.py",
        ".slotforge/data/000.tar",
        ".git/config",
        "shards/train/000.tar",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / ".gitignore").write_text("*.scratch\n")
    return root


def names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as zipped:
        return set(zipped.namelist())


def test_the_packages_and_the_recipe_travel_and_nothing_else(project: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "elsewhere" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text("name: mine")
    made = pack(recipe, tmp_path, project)
    assert made.recipe == "recipes/mine.yaml" and made.bytes == made.path.stat().st_size
    assert names(made.path) == {
        "orchestration/train.py",
        "pipelines/a.py",
        "slot_models/b.py",
        "recipes/demo.yaml",
        "recipes/mine.yaml",
        "pyproject.toml",
    }


def test_a_recipe_takes_the_place_of_the_projects_of_that_name(project: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "demo.yaml"
    recipe.write_text("name: other")
    with zipfile.ZipFile(pack(recipe, tmp_path, project).path) as zipped:
        assert zipped.read("recipes/demo.yaml") == b"name: other"


def test_the_same_files_give_the_same_archive(project: Path, tmp_path: Path) -> None:
    """Ray keeps an archive by its digest, and does not ask for it twice."""
    recipe = project / "recipes/demo.yaml"
    first = pack(recipe, tmp_path, project).path.read_bytes()
    os.utime(project / "pipelines/a.py", (10**9, 10**9))
    assert pack(recipe, tmp_path, project).path.read_bytes() == first


def test_too_large_a_package_names_its_largest_files(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "LIMIT", 100_000)
    (project / "pipelines/movie.npz").write_bytes(os.urandom(150_000))
    with pytest.raises(PackageError, match=r"package is 0\.1 MiB.*pipelines/movie\.npz \(0\.1 MiB\)"):
        pack(project / "recipes/demo.yaml", tmp_path, project)


def test_the_limit_is_rays() -> None:
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert package.LIMIT == DASHBOARD_CLIENT_MAX_SIZE


def test_what_is_packed_of_this_project_runs(tmp_path: Path) -> None:
    made = pack(project_root() / "recipes" / "demo.yaml", tmp_path)
    assert made.bytes < 5 * 2**20
    with zipfile.ZipFile(made.path) as zipped:
        zipped.extractall(tmp_path / "job")
    code = "import orchestration.recipe as r; print(r.__file__); print(r.load_recipe('demo').name)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "job", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(tmp_path / "job/orchestration/recipe.py"), "demo"]


def test_shards_that_no_node_would_find_are_refused(tmp_path: Path) -> None:
    recipe = "data: {{train: {train}, eval: {eval}}}\n"
    path = tmp_path / "own.yaml"
    for train, held_out, field in (("shards/train", "/x", "train"), ("/x", "shards/eval", "eval")):
        path.write_text(recipe.format(train=train, eval=held_out))
        with pytest.raises(RecipeError, match=rf"data\.{field}: 'shards/"):
            check_places(load_recipe(str(path)))
    path.write_text(recipe.format(train="s3://bucket/train", eval="/shared/eval"))
    check_places(load_recipe(str(path)))
