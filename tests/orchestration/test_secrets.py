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
from pipelines.sources import shown

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "aws-0dd5ecret",
    "MLFLOW_TRACKING_USERNAME": "user-0dd5ecret",
    "MLFLOW_TRACKING_PASSWORD": "password-0dd5ecret",
    "MLFLOW_TRACKING_TOKEN": "token-0dd5ecret",
    "HF_TOKEN": "hf-0dd5ecret",
    "SOME_API_KEY": "key-0dd5ecret",
}


@pytest.mark.parametrize("address", ["{folder}", 'pipe:test -n "$HF_TOKEN" && cat {folder}/{{name}}'])
def test_a_run_tells_no_secret(
    address: str, recipe: Recipe, data: Data, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    places = {name: address.format(folder=folder) for name, folder in (("train", data.train), ("eval", data.eval))}
    mine = parse_recipe(recipe.model_dump(mode="json") | {"data": {**places, "allow_pipe": True}})
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


def piped(recipe: Recipe, command: str) -> Recipe:
    data = {"train": f"pipe:{command}", "eval": "/held-out", "allow_pipe": True}
    return parse_recipe(recipe.model_dump(mode="json") | {"data": data})


@pytest.mark.parametrize(
    "command",
    [
        "AWS_SECRET_ACCESS_KEY=0dd5ecret aws s3 cp s3://bucket/{name} -",
        "AWS_ACCESS_KEY_ID='0dd5ecret' aws s3 cp s3://bucket/{name} -",
        "curl -H 'Authorization: Bearer 0dd5ecret' https://host/{name}",
        'curl -H "X-Api-Key: 0dd5ecret" https://host/{name}',
        "curl https://me:0dd5ecret@host/{name}",
        "curl -u me:0dd5ecret https://host/{name}",
        "curl --user='me:0dd5ecret' https://host/{name}",
        "curl 'https://host/{name}?X-Amz-Expires=60&X-Amz-Signature=0dd5ecret'",
        "curl 'https://host/{name}?sv=1&sig=0dd5ecret'",
        "wget --password 0dd5ecret -O - https://host/{name}",
        'fetch --auth-token="0dd5ecret" {name}',
        "PASSWORD='0dd5ecret of several words' fetch {name}",
    ],
)
def test_a_command_that_spells_out_a_secret_is_refused_and_never_shown(command: str, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"^data\.train.*\$NAME") as refusal:
        piped(recipe, command)
    assert "0dd5ecret" not in str(refusal.value) + shown(f"pipe:{command}")


@pytest.mark.parametrize(
    "command",
    [
        "AWS_SECRET_ACCESS_KEY=$KEY aws s3 cp s3://bucket/{name} -",
        'curl -H "Authorization: Bearer $TOKEN" https://host/{name}',
        'curl -H "Authorization: Bearer $(cat /run/token)" https://host/{name}',
        "curl https://me:$WORD@host/{name}",
        'curl -u "$ME:$WORD" https://host/{name}?version=3',
        'fetch --token "$TOKEN" {name}',
        "fetch --token-file /run/token {name}",
        "ssh -p 22 me@host cat /data/tokens/{name}",
        "rclone cat remote:bucket/{name}",
    ],
)
def test_a_command_that_names_where_its_secret_is_may_be_logged(command: str, recipe: Recipe) -> None:
    assert piped(recipe, command).data.train[0].url == f"pipe:{command}"  # type: ignore[index]


def test_of_a_command_its_program_is_shown() -> None:
    assert shown("pipe:A=b C='d e' /usr/bin/fetch --all {name}") == "pipe:/usr/bin/fetch ..."
    assert shown("pipe:$(cat /run/secret) {name}") == shown("pipe:fetch 'unmatched") == "pipe: ..."


@pytest.mark.parametrize("uri", ["https://me:0dd5ecret@host", "https://host/?access_token=0dd5ecret"])
def test_a_recipe_whose_store_holds_a_secret_is_refused_without_repeating_it(uri: str, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"^tracking\.uri.*MLFLOW_TRACKING_PASSWORD") as refusal:
        parse_recipe(recipe.model_dump(mode="json") | {"tracking": {"uri": uri}})
    assert "0dd5ecret" not in str(refusal.value)
