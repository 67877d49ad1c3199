"""Each test of a run's folder runs on a disk and on a real S3 server."""

from pathlib import Path

import pytest

from orchestration.runs.storage import Storage, storage_at


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The path or address of a folder that is not there yet."""
    return str(tmp_path / "place") if request.param == "disk" else str(request.getfixturevalue("s3"))


@pytest.fixture
def storage(place: str) -> Storage:
    return storage_at(place)
