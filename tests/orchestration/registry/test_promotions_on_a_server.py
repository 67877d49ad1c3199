"""Promotion and rollback through a real MLflow server, which takes less than a store in a file does."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from made_up import new
from servers import mlflow_server

from orchestration.registry.promote import CHAMPION, moved_by_hand, rollback

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with mlflow_server(tmp_path) as address:
        yield address


def test_there_and_back(server: str) -> None:
    client = mlflow.MlflowClient(server, registry_uri=server)
    registry = new(client, "served")
    first, better, worse = registry.add(0.8), registry.add(0.9), registry.add(0.7)
    assert registry.promote(first, floors={"fg_ari": 0.75}).champion
    assert registry.promote(better).champion
    assert not registry.promote(worse).champion
    assert registry.aliases() == (better, first)
    assert moved_by_hand(client, "served") is None
    assert rollback(client, "served") == (first, better)
    assert registry.aliases() == (first, better)
    client.set_registered_model_alias("served", CHAMPION, worse)
    assert "champion is version 3, the last decision says version 1" in str(moved_by_hand(client, "served"))
    assert client.search_model_versions("name = 'served.promotions'") == [], "nobody holds the lock any more"
