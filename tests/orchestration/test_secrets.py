"""What the environment and addresses keep secret is nowhere in MLflow, in the run's folder or on the screen."""

import time
from pathlib import Path

import pytest

from orchestration.assembly import Data
from orchestration.events import Event
from orchestration.prepare import check_data
from orchestration.recipe import Recipe, RecipeError, parse_recipe
from orchestration.runs.folder import RunFolder
from orchestration.tracking import store_uri
from orchestration.tracking.page import Page

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "aws-0dd5ecret",
    "MLFLOW_TRACKING_USERNAME": "user-0dd5ecret",
    "MLFLOW_TRACKING_PASSWORD": "password-0dd5ecret",
    "MLFLOW_TRACKING_TOKEN": "token-0dd5ecret",
    "HF_TOKEN": "hf-0dd5ecret",
    "SOME_API_KEY": "key-0dd5ecret",
}


def test_a_run_tells_no_secret(recipe: Recipe, data: Data, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    mine = parse_recipe(recipe.model_dump(mode="json") | {"data": {"train": str(data.train), "eval": str(data.eval)}})
    folder = RunFolder.of(mine)
    folder.claim(mine)
    folder.note(data=check_data(mine))
    said: list[str] = []
    with Page(mine, folder, lambda text, style: said.append(text)) as page:
        page.begins(0, [{"address": "10.0.0.1", "CPU": 2.0}])
        page.happened(Event(time.time(), "workers", "training on 2 workers", 0))
        page.measured("10.0.0.1", "abc", [("system/cpu_utilization_percentage", 3.0, 1000, 1)])
        assert page.close("FINISHED")
    kept = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert any(b"train.batch_size" in content for content in kept.values()), "the store itself is among them"
    assert any(path.name == "facts.json" for path in kept)
    leaks = [str(path) for path, content in kept.items() if b"0dd5ecret" in content]
    assert leaks == [] and "0dd5ecret" not in "\n".join(said)


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:0dd5ecret@mlflow.example.org",
        "postgresql://me:0dd5ecret@db/mlflow",
        "postgresql://db/mlflow?user=me&password=0dd5ecret",
        "https://mlflow.example.org/?access_token=0dd5ecret",
    ],
)
def test_a_store_whose_address_holds_a_secret_is_refused_without_repeating_it(uri: str) -> None:
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        store_uri(uri)
    assert "0dd5ecret" not in str(refusal.value)
    assert store_uri("postgresql://db/mlflow?sslmode=require") == "postgresql://db/mlflow?sslmode=require"
