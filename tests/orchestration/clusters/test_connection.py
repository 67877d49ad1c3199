"""The Ray that we start keeps its token to its owner."""

import stat
from pathlib import Path

from orchestration.clusters.connection import token_file


def test_a_token_is_readable_by_its_owner_alone_and_stays_the_same(tmp_path: Path) -> None:
    path = token_file(tmp_path / "state" / "ray-token")
    token = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) == 64
    assert token_file(path).read_text() == token
