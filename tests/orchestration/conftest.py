"""A small recipe, its shards, and a state folder of its own for every test."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import s3_server

from orchestration.assembly import Data
from orchestration.recipe import Recipe, parse_recipe
from pipelines import write_index
from pipelines.scenes import Tetrominoes, render_shard

BUCKET = "runs"
FIELDS = {
    "name": "small",
    "data": {"scenes": {"pieces": [1, 3], "grid": 5, "cell": 2, "train": 200, "eval": 30, "per_shard": 50}},
    "model": {
        "image_size": 10,
        "num_slots": 4,
        "slot_dim": 16,
        "encoder": {"channels": 8, "strides": [2, 1]},
        "attention": {"hidden_dim": 16},
        "gate": {},
        "decoder": {"channels": 8, "layers": 2, "kernel": 3, "patch": 2},
    },
    "train": {
        "steps": 12,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "keep_weight": 0.01,
        "gate_from": 3,
        "checkpoint_every": 4,
    },
    "tracking": {"every": 1},
    "evaluate": {"every": 6, "batch_size": 8},
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLOTFORGE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return parse_recipe(FIELDS)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Four training shards and one held out, as orchestration.prepare renders them."""
    folder = tmp_path_factory.mktemp("shards")
    scenes = Tetrominoes(pieces=(1, 3), grid=5, cell=2)
    about = {"masks": True}
    write_index(folder / "train", [render_shard(folder / "train", scenes, 0, shard, 50) for shard in range(4)], about)
    write_index(folder / "eval", [render_shard(folder / "eval", scenes, 0, 4, 30)], about)
    return Data(folder / "train", folder / "eval")


@pytest.fixture(scope="session")
def bucket() -> Iterator[dict[str, str]]:
    """The environment of a real S3 server with a bucket."""
    with s3_server(BUCKET) as environment:
        yield environment


@pytest.fixture
def s3(bucket: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """An address in a bucket that nobody else uses."""
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{secrets.token_hex(8)}"
