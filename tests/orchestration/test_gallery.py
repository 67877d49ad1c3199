"""Pictures on their way to MLflow."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from orchestration.assembly import build_model
from orchestration.glimpse import Glimpse
from orchestration.pictures import scene_figure
from orchestration.recipe import Recipe
from orchestration.tracking.gallery import Gallery
from slot_models import SlotCounts, count_confusion


class FakeTracker:
    def __init__(self) -> None:
        self.pictures: dict[tuple[str, int], PIL.Image.Image] = {}
        self.tables: dict[str, Any] = {}
        self.client, self.run_id, self.broken = self, "run", False

    def picture(self, key: str, step: int, image: PIL.Image.Image) -> None:
        if self.broken and key != "scenes":
            raise OSError("no such bucket")
        self.pictures[key, step] = image

    def log_dict(self, run_id: str, table: Any, path: str) -> None:
        self.tables[path] = table


@pytest.fixture
def glimpse(recipe: Recipe) -> bytes:
    images = np.full((2, 10, 10, 3), 200, dtype=np.uint8)
    with torch.no_grad():
        output = build_model(recipe).eval()(torch.full((2, 3, 10, 10), 0.5), trace=True)
    counts = SlotCounts(count_confusion(torch.tensor([2, 2, 4]), torch.tensor([2, 2, 3]), 4, 3))
    return Glimpse(images, output, counts).to_bytes()


def test_a_glimpse_becomes_pictures_and_a_table_of_its_step(tmp_path: Path, glimpse: bytes) -> None:
    tracker: Any = FakeTracker()
    gallery = Gallery(tmp_path / "pictures")
    gallery.deliver(tracker)
    for step in (50, 100):
        gallery.add(step, glimpse)
    gallery.deliver(tracker)
    assert set(tracker.pictures) == {(name, step) for name in ("scenes", "attention", "counts") for step in (50, 100)}
    assert all(len(np.unique(np.asarray(picture))) > 10 for picture in tracker.pictures.values())
    table = tracker.tables["counts/000000100.json"]
    assert table == {"columns": ["kept slots", "objects", "images"], "data": [[2, 2, 2], [4, 3, 1]]}
    assert list((tmp_path / "pictures").iterdir()) == []


def test_pictures_that_cannot_be_sent_wait_for_whoever_comes(tmp_path: Path, glimpse: bytes) -> None:
    tracker: Any = FakeTracker()
    tracker.broken = True
    gallery = Gallery(tmp_path)
    gallery.add(50, glimpse)
    with pytest.raises(OSError, match="no such bucket"):
        gallery.deliver(tracker)
    tracker.broken = False
    Gallery(tmp_path).deliver(tracker)
    assert {name for name, _ in tracker.pictures} == {"scenes", "attention", "counts"}


def test_features_are_not_drawn(recipe: Recipe) -> None:
    with torch.no_grad():
        output = build_model(recipe).eval()(torch.zeros(1, 3, 10, 10))
    features = output._replace(target=torch.zeros(1, 384, 2, 2), reconstruction=torch.zeros(1, 384, 2, 2))
    again = Glimpse.from_bytes(Glimpse(np.zeros((1, 10, 10, 3), np.uint8), features, None).to_bytes())
    assert again.output.pictures is None and again.output.attention is None and again.counts is None
    assert len(scene_figure(again.images, again.output).axes) == 2 + recipe.model.num_slots
