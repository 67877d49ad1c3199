"""COCO: polygons and run lengths against pixels painted by hand and against pycocotools' own encoder."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as codec
from test_ingest_folder import members_of

from pipelines.errors import DataError
from pipelines.ingest import BadRecord, Coco, Framing, Ingest, Ingested, ingest
from pipelines.ingest.coco import _covers, inside
from pipelines.samples import decode

HEIGHT, WIDTH = 12, 16


def box(left: int, top: int, right: int, bottom: int) -> list[float]:
    """The polygon around the pixels [top:bottom, left:right]."""
    return [left, top, right, top, right, bottom, left, bottom]


def runs(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths down the columns, first the zeros, written out."""
    counts, value = [], False
    for bit, group in itertools.groupby(mask.ravel(order="F").tolist()):
        if bit != value and not counts:
            counts.append(0)
        counts.append(len(list(group)))
        value = bit
    return {"size": list(mask.shape), "counts": counts}


def annotation(image: int, segmentation: Any, category: int = 1, crowd: int = 0) -> dict[str, Any]:
    return {"id": 7, "image_id": image, "segmentation": segmentation, "category_id": category, "iscrowd": crowd}


def make(folder: Path, annotations: list[dict[str, Any]], names: tuple[str, ...] = ("a.jpg",), **change: Any) -> Path:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "train2017").mkdir(exist_ok=True)
    for name in names:
        if not name.startswith((".", "/")):
            Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(folder / "train2017" / name)
    images = [{"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH} for i, name in enumerate(names)]
    path = folder / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []} | change))
    return path


def run(path: Path, out: Path, **how: Any) -> Ingested:
    return ingest(Ingest(Coco(path), only="train", **how), out)


def sample_of(out: Path, row: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    members = members_of(out / "train")[row]
    sample = decode(members, with_masks=True)
    assert sample.masks is not None
    return sample.masks, json.loads(members["json"])


def test_the_smaller_lies_on_top_and_crowds_are_background(tmp_path: Path) -> None:
    crowd = np.zeros((HEIGHT, WIDTH), dtype=bool)
    crowd[8:, :] = True
    path = make(
        tmp_path,
        [
            annotation(0, [box(2, 2, 4, 4)], 5),  # 4 pixels, inside the next
            annotation(0, [box(0, 0, 8, 8)], 6),  # 64 pixels
            annotation(0, runs(crowd), 7, crowd=1),
            annotation(0, [box(10, 0, 12, 3), box(10, 6, 12, 9)], 8),  # in two parts, the second one in the crowd
            annotation(0, [box(5, 5, 6, 6)], 9),
            annotation(0, [box(5, 5, 6, 6)], 10),  # hides the one before: equal areas, later in the file
        ],
    )
    result = run(path, tmp_path / "out")
    masks, facts = sample_of(tmp_path / "out")
    expected = np.zeros((HEIGHT, WIDTH), dtype=int)
    expected[0:8, 0:8] = 1
    expected[0:3, 10:12] = expected[6:9, 10:12] = 2
    expected[2:4, 2:4] = 3
    expected[5, 5] = 4
    assert np.array_equal(masks, expected)
    assert facts["factors"]["category"] == [6, 8, 5, 10] and facts["num_objects"] == 4 and facts["crowds"] == 1
    assert result.train is not None and result.train.about["files"] == ["instances_train2017.json"]
    stored = members_of(tmp_path / "out" / "train")[0]["image.jpg"]
    assert stored == (tmp_path / "train2017" / "a.jpg").read_bytes()


def test_an_image_without_annotations_has_no_objects(tmp_path: Path) -> None:
    path = make(tmp_path, [annotation(1, [])], ("a.jpg", "b.jpg"))
    run(path, tmp_path / "out")
    for row in range(2):
        masks, facts = sample_of(tmp_path / "out", row)
        assert not masks.any() and facts["num_objects"] == 0 and "crowds" not in facts


def test_objects_outside_the_crop_are_gone(tmp_path: Path) -> None:
    path = make(tmp_path, [annotation(0, [box(0, 0, 2, 12)], 3), annotation(0, [box(6, 0, 8, 4)], 4)])
    run(path, tmp_path / "out", framing=Framing(24, "centre"))
    masks, facts = sample_of(tmp_path / "out")
    expected = np.zeros((24, 24), dtype=int)
    expected[0:8, 8:12] = 1
    assert np.array_equal(masks, expected) and facts["factors"] == {"category": [4]} and facts["num_objects"] == 1


@settings(deadline=None)
@given(arrays.arrays(np.bool_, st.tuples(st.integers(1, 30), st.integers(1, 30))))
def test_run_lengths_come_back_packed_and_not(mask: np.ndarray) -> None:
    height, width = mask.shape
    packed = codec.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = {"size": [height, width], "counts": packed["counts"].decode()}
    for segmentation in (runs(mask), packed, text):
        assert np.array_equal(_covers(segmentation, height, width, 0), mask)


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(
        st.text(max_size=20),
        st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=20),
        st.lists(st.integers(-5, 300), max_size=8),
        st.none(),
    )
)
def test_wrong_run_lengths_never_reach_the_codec(counts: Any) -> None:
    try:
        mask = _covers({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH, 0)
    except BadRecord:
        return
    assert mask.shape == (HEIGHT, WIDTH)
    if isinstance(counts, list):
        assert min(counts) >= 0 and sum(counts) == HEIGHT * WIDTH


@settings(deadline=None)
@given(st.lists(st.integers(0, HEIGHT * WIDTH), max_size=8))
def test_run_lengths_may_be_empty(cuts: list[int]) -> None:
    counts = np.diff([0, *sorted(cuts), HEIGHT * WIDTH])
    expected = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape((HEIGHT, WIDTH), order="F")
    segmentation = {"size": [HEIGHT, WIDTH], "counts": counts.tolist()}
    assert np.array_equal(_covers(segmentation, HEIGHT, WIDTH, 0), expected)


@pytest.mark.parametrize(
    ("segmentation", "problem"),
    [
        ([[1, 2, 3, 4]], "three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "three points"),
        ([[0, 0, 1e9, 0, 5, 5]], "far outside"),
        ([[0, 0, float("nan"), 0, 5, 5]], "far outside"),
        ([["a", 0, 1, 0, 5, 5]], "could not convert"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH, 1]}, "do not add up to 192"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**40]}, "do not add up"),
        ({"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}, "on an image of"),
        ({"size": [HEIGHT, WIDTH], "counts": "\x00\x00"}, "packed form"),
        ({"counts": [1]}, "size"),
        (None, "not NoneType"),
    ],
)
def test_a_bad_annotation_is_named(tmp_path: Path, segmentation: Any, problem: str) -> None:
    path = make(tmp_path, [annotation(1, [box(0, 0, 1, 1)]), annotation(1, segmentation)], ("a.jpg", "b.jpg"))
    with pytest.raises(DataError, match=rf"b\.jpg: annotation 1 of the image: .*{problem}"):
        run(path, tmp_path / "out")
    result = run(path, tmp_path / "out", skip_bad=True)
    assert len(result.left_out) == 1 and result.train is not None and result.train.num_samples == 1


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../b.jpg", "", "..", "a\\..\\b", "link.jpg"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "link.jpg").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadRecord, match="leads out of its folder"):
        inside(tmp_path / "train2017", name)
    if name != "link.jpg":
        path = make(tmp_path, [], ("a.jpg",), images=[{"id": 0, "file_name": name, "height": 1, "width": 1}])
        with pytest.raises(DataError, match="leads out of its folder"):
            run(path, tmp_path / "out")


def test_images_are_where_they_are_said_to_be(tmp_path: Path) -> None:
    path = make(tmp_path, [])
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"train2017: not a folder; .*--images"):
        run(path, tmp_path / "out")
    ingest(Ingest(Coco(path, tmp_path / "elsewhere"), only="train"), tmp_path / "out")
    assert len(members_of(tmp_path / "out" / "train")) == 1


def test_a_missing_or_other_image_is_named(tmp_path: Path) -> None:
    path = make(tmp_path, [], ("a.jpg", "b.jpg"))
    (tmp_path / "train2017" / "a.jpg").unlink()
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(tmp_path / "train2017" / "b.jpg")
    with pytest.raises(DataError, match=r"a\.jpg: .*No such file"):
        run(path, tmp_path / "out")
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "train2017" / "a.jpg")
    with pytest.raises(DataError, match=r"b\.jpg: the image is 5x5, its annotations are of 12x16"):
        run(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "not a COCO file"),
        ("{", "not a COCO file"),
        ("[" * 100_000, "not a COCO file"),
        ('{"images": [], "annotations": [{"id": 3, "image_id": 9}]}', "annotation 3 is of image 9"),
        ('{"images": [{"id": 1}], "annotations": []}', "file_name"),
    ],
)
def test_what_is_no_coco_file_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = make(tmp_path, [])
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        run(path, tmp_path / "out")
