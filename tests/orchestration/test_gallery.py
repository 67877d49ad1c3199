"""Pictures on their way to MLflow."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from orchestration.assembly import build_model
from orchestration.glimpse import Glimpse
from orchestration.pictures import GAP, HEAD, SIDE, attention_sheet, scene_sheet, slot_colours
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
    gallery.finish()
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
    assert scene_sheet(again.images, again.output).width == GAP + (2 + recipe.model.num_slots) * (SIDE + GAP)


def test_a_sheet_frames_the_kept_slots_in_their_colours_and_no_other(recipe: Recipe) -> None:
    images = np.full((2, 10, 10, 3), 200, dtype=np.uint8)
    with torch.no_grad():
        output = build_model(recipe).eval()(torch.full((2, 3, 10, 10), 0.5))
    keep = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    sheet = np.asarray(scene_sheet(images, output._replace(keep=keep)))
    colours = np.rint(slot_colours(4) * 255)
    for row in range(2):
        for slot in range(4):
            top, left = HEAD + row * (SIDE + GAP), GAP + (3 + slot) * (SIDE + GAP)
            edges = [sheet[top, left : left + SIDE], sheet[top : top + SIDE, left + SIDE - 1]]
            assert all((edge == colours[slot]).all() == bool(keep[row, slot]) for edge in edges), (row, slot)
    assert (sheet[HEAD + 5, GAP + 5] == 200).all(), "the input is shown as it is"


@pytest.mark.parametrize(("side", "shown"), [(10, 160), (21, 147), (128, 128), (224, 160)])
def test_small_images_are_enlarged_by_whole_pixels_and_large_ones_shrunk(side: int, shown: int) -> None:
    images = np.zeros((1, side, side, 3), dtype=np.uint8)
    images[:, 0, 0] = 255
    sheet = np.asarray(attention_sheet(images, torch.full((1, 2, 3, 4, 4), 1 / 3)))
    assert sheet.shape == (HEAD + shown + GAP, GAP + 3 * (shown + GAP), 3)
    white = (sheet[HEAD : HEAD + shown, GAP : GAP + shown] == 255).all(axis=2)
    assert white.sum() == max(1, shown // side) ** 2


def test_drawing_takes_its_share_of_the_time_and_leaves_nothing_out(tmp_path: Path, glimpse: bytes) -> None:
    seconds, spent = [0.0], [0.0]

    def cpu() -> float:  # each look is half a second of drawing later
        spent[0] += 0.5
        return spent[0]

    tracker: Any = FakeTracker()
    gallery = Gallery(tmp_path, now=lambda: seconds[0], cpu=cpu)
    drawn: list[list[int]] = []
    for step in range(1, 11):  # an evaluation each 10 seconds, a picture of which costs 0.5
        gallery.add(step, glimpse)
        gallery.deliver(tracker)
        drawn.append(sorted({step for _, step in tracker.pictures}))
        seconds[0] += 10
    assert drawn == [[1], [1], [1], [1, 4], [1, 4], [1, 4], [1, 4, 7], [1, 4, 7], [1, 4, 7], [1, 4, 7, 10]]
    gallery.finish()
    gallery.deliver(tracker)
    assert {step for _, step in tracker.pictures} == set(range(1, 11))
    assert list(tmp_path.iterdir()) == []
