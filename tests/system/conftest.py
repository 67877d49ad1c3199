"""One state folder, and an undisturbed run to compare with."""

from pathlib import Path

import pytest
from runs import Run


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One state folder for all system tests: the shards are rendered once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def twin(home: Path) -> tuple[Run, str]:
    """An undisturbed run, and what it printed."""
    run = Run(home, "twin")
    code, output = run.finish(run.start())
    assert code == 0, output
    return run, output
