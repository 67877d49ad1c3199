"""A run trained from a URL learns bit for bit what it learns from the same shards on disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faulty_server import FaultyServer
from servers import s3_server

from orchestration.bare import train_bare
from orchestration.prepare import data_folders
from orchestration.recipe import Recipe, parse_recipe
from orchestration.worker import StepReport
from pipelines import write_index
from pipelines.scenes import Tetrominoes, render_shard

STEPS = 7  # over the end of an epoch of 5


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, scenes = tmp_path_factory.mktemp("afar"), Tetrominoes(pieces=(1, 3), grid=5, cell=2)
    write_index(folder, [render_shard(folder, scenes, 0, shard, 20) for shard in range(4)], {"masks": True})
    return folder


@pytest.fixture(scope="module")
def s3(shards: Path) -> Iterator[str]:
    import boto3

    with s3_server("afar") as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        for path in shards.iterdir():
            client.put_object(Bucket="afar", Key=f"train/{path.name}", Body=path.read_bytes())
        yield "s3://afar/train"


def recipe_of(where: str, **data: object) -> Recipe:
    return parse_recipe(
        {
            "name": "afar",
            "data": {"train": where, "eval": where, "augment": {"flip": True}, "lanes": 4, "window": 1} | data,
            "model": {
                "image_size": 10,
                "num_slots": 3,
                "slot_dim": 8,
                "encoder": {"channels": 4, "strides": [2, 1]},
                "attention": {"hidden_dim": 8},
                "decoder": {"channels": 4, "layers": 2, "kernel": 3, "patch": 2},
            },
            "train": {"steps": STEPS, "batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 2},
        }
    )


def losses(recipe: Recipe) -> torch.Tensor:
    """What each step reports, [steps, values]."""
    reports: list[StepReport] = []
    train_bare(recipe, data_folders(recipe), hooks=(reports.append,))
    assert [report.step for report in reports] == list(range(STEPS))
    return torch.stack([report.means for report in reports])


def test_losses_are_those_of_local_shards(shards: Path, s3: str, tmp_path: Path) -> None:
    local = losses(recipe_of(str(shards)))
    assert local[:, 1].isfinite().all() and len(set(local[:, 1].tolist())) == STEPS
    kept, read_anew = {"folder": str(tmp_path / "cache"), "gigabytes": 1.0}, {"gigabytes": 0.0}
    with FaultyServer.of(shards) as server:
        failures = iter(["500", "drop", "reset"])
        server.fault = lambda name, number: next(failures, "") if name.endswith(".tar") else ""
        afar = [
            losses(recipe_of(server.url, cache=kept)),
            losses(recipe_of(s3, cache=read_anew, decode_workers=1)),
        ]
        asked = sum(server.asked[f"{shard:06d}.tar"] for shard in range(4))
        again = losses(recipe_of(server.url, cache=kept))
        assert sum(server.asked[f"{shard:06d}.tar"] for shard in range(4)) == asked >= 7  # the second run has them
    for found in (*afar, again):
        assert torch.equal(torch.nan_to_num(found, nan=-7.0), torch.nan_to_num(local, nan=-7.0))
