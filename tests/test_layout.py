"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVICE = {"orchestration", "ray", "mlflow", "deepspeed", "pydantic"}
EXTRAS = {"scipy", "timm"}  # of slot_models: where they are used, inside a function


def imports(source: str, package: str = "") -> set[tuple[str, bool]]:
    """(first name of the imported module, whether it is imported with the file) of every import in a file.

    Imports inside functions, and of a module named by a literal, count; relative ones are of the file's package.
    """
    found = set()

    def visit(node: ast.AST, at_once: bool) -> None:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [package if node.level else node.module or ""]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names = [str(node.args[0].value)] if called in ("import_module", "__import__") else []
        found.update((name.split(".")[0], at_once) for name in names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_once and not inside)

    visit(ast.parse(source), True)
    return found


def files_of(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    return files


def foreign(path: Path) -> set[tuple[str, bool]]:
    """Imports beyond the standard library."""
    package = path.relative_to(ROOT).parts[0]
    return {pair for pair in imports(path.read_text(), package) if pair[0] not in sys.stdlib_module_names}


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import ray.train as train, numpy
if True:
    from mlflow.tracking import MlflowClient
def f():
    import deepspeed
    g = lambda: importlib.import_module("pydantic.main")
class A:
    def method(self):
        __import__("pipelines")
from . import neighbour
"""
    assert imports(source, "slot_models") == {
        ("ray", True),
        ("numpy", True),
        ("mlflow", True),
        ("deepspeed", False),
        ("pydantic", False),
        ("pipelines", False),
        ("slot_models", True),
    }


@pytest.mark.parametrize("path", files_of("slot_models"), ids=lambda path: path.name)
def test_slot_models_know_torch_einops_and_numpy_alone(path: Path) -> None:
    allowed = {"torch", "einops", "numpy", "slot_models"} | ({"triton"} if path.name == "kernels.py" else set())
    known = foreign(path)
    assert {name for name, at_once in known if at_once} <= allowed
    assert {name for name, _ in known} <= allowed | EXTRAS


@pytest.mark.parametrize("path", files_of("pipelines"), ids=lambda path: str(path.relative_to(ROOT / "pipelines")))
def test_pipelines_know_neither_models_nor_the_service(path: Path) -> None:
    assert not {name for name, _ in foreign(path)} & (SERVICE | {"slot_models"})


@pytest.mark.parametrize("name", ["plan.py", "noise.py", "index.py"])
def test_the_data_order_is_numpy_alone(name: str) -> None:
    assert {known for known, _ in foreign(ROOT / "pipelines" / name)} <= {"numpy", "pipelines"}


def test_the_training_loop_knows_torch_and_slot_models_alone() -> None:
    assert {name for name, _ in foreign(ROOT / "orchestration" / "worker.py")} == {"torch", "slot_models"}


def test_importing_a_package_loads_nothing_of_the_service() -> None:
    for package, other in (("slot_models", "pipelines"), ("pipelines", "slot_models")):
        code = f"import sys, {package}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
        loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert package in loaded.stdout.split()
        assert not set(loaded.stdout.split()) & (SERVICE | {other})
