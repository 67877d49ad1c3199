"""The top of a run's page, in a real store: what MLflow knows of the run, and its newest pictures."""

import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import PIL.Image
import pytest

from orchestration.assembly import Data
from orchestration.prepare import check_data
from orchestration.recipe import Recipe, parse_recipe
from orchestration.runs.folder import RunFolder
from orchestration.tracking import Tracker
from orchestration.tracking.description import NOTE, Description, describe
from orchestration.tracking.provenance import Provenance, code
from orchestration.tracking.tracker import PAGE_WIDTH


@pytest.fixture
def mine(recipe: Recipe, data: Data) -> Recipe:
    return parse_recipe(recipe.model_dump(mode="json") | {"data": {"train": str(data.train), "eval": str(data.eval)}})


@pytest.fixture
def tracker(mine: Recipe) -> Tracker:
    folder = RunFolder.of(mine)
    folder.claim(mine)
    return Tracker(mine, folder)


def note(tracker: Tracker) -> str:
    return str(tracker.client.get_run(tracker.run_id).data.tags.get(NOTE, ""))


def shown(tracker: Tracker) -> list[str]:
    """The artifacts that the page shows, by the links of its pictures."""
    links = [urlsplit(link) for link in re.findall(r"!\[\w+\]\((\S+)\)", note(tracker))]
    assert all(link.path == "get-artifact" and parse_qs(link.query)["run_uuid"] == [tracker.run_id] for link in links)
    return [parse_qs(link.query)["path"][0] for link in links]


def test_the_page_tells_what_runs_and_shows_the_newest_pictures(mine: Recipe, tracker: Tracker, tmp_path: Path) -> None:
    Provenance(mine, check_data(mine), code()).deliver(tracker)
    description = Description(mine)
    description.deliver(tracker)
    assert "200 images in train, 30 images in eval" in note(tracker)
    assert str(code()) in note(tracker) and "12 steps of 16 images, seed 0" in note(tracker)
    assert shown(tracker) == []

    for step, colour in ((6, "red"), (12, "green"), (3, "blue")):  # the last one waited
        tracker.picture("scenes", step, PIL.Image.new("RGB", (20, 10), colour))
        description.deliver(tracker)
    tracker.picture("counts", 12, PIL.Image.new("RGB", (10, 10), "black"))
    Description(mine).deliver(tracker)  # a later driver's
    assert shown(tracker) == ["pictures/scenes.png", "pictures/counts.png"]
    path = tracker.client.download_artifacts(tracker.run_id, "pictures/scenes.png", str(tmp_path))
    assert PIL.Image.open(path).getpixel((0, 0)) == (0, 128, 0)
    tracker.show("scenes", PIL.Image.new("RGB", (3 * PAGE_WIDTH, 300)))
    path = tracker.client.download_artifacts(tracker.run_id, "pictures/scenes.png", str(tmp_path))
    assert PIL.Image.open(path).size == (PAGE_WIDTH, 100)

    describe(tracker, mine, {"FG-ARI": "0.950"})
    assert note(tracker).startswith("| | |\n|---|---|\n| FG-ARI | 0.950 |\n| data | 200 images")


def test_a_page_without_anything_yet_is_described(mine: Recipe, tracker: Tracker) -> None:
    Description(mine).deliver(tracker)
    assert "4 slots (a gate decides which are kept), images of 10 x 10" in note(tracker)
    assert shown(tracker) == [] and "| code |" not in note(tracker) and "| data |" not in note(tracker)


def test_a_page_is_found_on_the_server_or_on_the_one_that_is_started(tracker: Tracker) -> None:
    found = rf"http://127.0.0.1:5000/#/experiments/1/runs/{tracker.run_id}\?workflowType=machine_learning"
    assert re.fullmatch(found, tracker.page)
    tracker.uri = "https://mlflow.example.org/"
    assert tracker.page.startswith("https://mlflow.example.org/#/experiments/1/runs/")
