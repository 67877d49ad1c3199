"""MOVi videos become frames: every frame, every visible instance, no video in both sets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_ingest_folder import members_of
from written_examples import Values, example, floats, integers, png, write

from pipelines.errors import DataError
from pipelines.ingest import Ingest, ingest, open_source
from pipelines.samples import decode

FRAMES, INSTANCES = 5, 3


def video(number: int) -> tuple[dict[str, Values], np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(features, frames [F, H, W, 3], segmentations [F, H, W], factors [I, ...] by name)."""
    random = np.random.default_rng(number)
    frames = random.integers(0, 256, (FRAMES, 8, 8, 3), dtype=np.uint8)
    segmentations = random.integers(0, INSTANCES + 1, (FRAMES, 8, 8), dtype=np.uint8)
    segmentations[2][segmentations[2] == 2] = 0  # instance 1 is out of view in frame 2
    factors = {
        "category": random.integers(0, 17, INSTANCES),
        "mass": random.random(INSTANCES, dtype=np.float32),
        "visibility": random.integers(0, 64, (INSTANCES, FRAMES)),
        "positions": random.random((INSTANCES, FRAMES, 3), dtype=np.float32),
    }
    features = {
        "video": ([png(frame) for frame in frames], "byte"),
        "segmentations": ([png(ids) for ids in segmentations], "byte"),
        "metadata/num_frames": integers(FRAMES),
        "metadata/num_instances": integers(INSTANCES),
        "metadata/video_name": ([str(number).encode()], "byte"),
        "metadata/depth_range": floats([0, 1]),
        "instances/category": integers(factors["category"]),
        "instances/mass": floats(factors["mass"]),
        "instances/visibility": integers(factors["visibility"]),
        "instances/positions": floats(factors["positions"]),
        "instances/bbox_frames/ragged_row_lengths_0": integers([1, 2, 3]),
    }
    return features, frames, segmentations, factors


def make(folder: Path, count: int) -> list[Any]:
    videos = [video(number) for number in range(count)]
    for part in range(2):
        records = [example(features) for features, *_ in videos[part::2]]
        write(folder / f"movi_c-train.tfrecord-{part:05d}-of-00002", records, packed=False)
    return videos[::2] + videos[1::2]


def test_every_frame_and_every_visible_instance_comes_out(tmp_path: Path) -> None:
    videos = make(tmp_path, 4)
    ingest(Ingest(open_source("movi", tmp_path / "movi_c-train"), only="train", per_shard=12), tmp_path / "out")
    read = members_of(tmp_path / "out" / "train")
    assert len(read) == 4 * FRAMES
    for place, members in enumerate(read):
        features, frames, segmentations, factors = videos[place // FRAMES]
        frame = place % FRAMES
        sample, facts = decode(members, with_masks=True), json.loads(members["json"])
        present = [i for i in range(INSTANCES) if (segmentations[frame] == i + 1).any()]
        assert len(present) == (2 if frame == 2 else 3)
        expected = sum((segmentations[frame] == i + 1) * label for label, i in enumerate(present, start=1))
        assert np.array_equal(sample.image, frames[frame]) and np.array_equal(sample.masks, expected)  # type: ignore[arg-type]
        assert members["image.png"] == features["video"][0][frame]
        assert sample.num_objects == len(present)
        assert facts["frame"] == frame and facts["video"] == features["metadata/video_name"][0][0].decode()
        for name in ("category", "mass"):
            assert facts["factors"][name] == factors[name][present].tolist()
        for name in ("visibility", "positions"):
            assert facts["factors"][name] == factors[name][present, frame].tolist()


def test_a_video_is_in_one_set_and_one_shard(tmp_path: Path) -> None:
    make(tmp_path, 10)
    job = Ingest(open_source("movi", tmp_path), held_out=0.2, per_shard=12)
    result = ingest(job, tmp_path / "out")
    assert result.train is not None and result.held_out is not None
    assert [shard.samples for shard in result.train.shards] == [10] * 4  # two videos a shard, though twelve would fit
    videos = [
        {json.loads(members["json"])["video"] for members in members_of(tmp_path / "out" / part)}
        for part in ("train", "eval")
    ]
    assert len(videos[0]) == 8 and len(videos[1]) == 2 and not videos[0] & videos[1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"video": ([b"no image"] * FRAMES, "byte")}, "cannot identify image"),
        ({"segmentations": ([png(np.zeros((8, 8), np.uint8))], "byte")}, "5 frames, 1 segmentations"),
        ({"segmentations": ([png(np.full((8, 8), 9, np.uint8))] * 5, "byte")}, "frame 0: id 9 .* 3 instances"),
        ({"segmentations": ([png(np.zeros((4, 8), np.uint8))] * 5, "byte")}, r"frame 0: segmentation \[4, 8\]"),
        ({"metadata/num_frames": integers([])}, "num_frames: .* is not one count"),
        ({"metadata/num_instances": floats([3])}, "num_instances: it holds floats"),
    ],
)
def test_a_bad_video_is_left_out_as_a_whole(tmp_path: Path, change: dict[str, Values], problem: str) -> None:
    good, bad = video(0)[0], video(1)[0] | change
    path = write(tmp_path / "m.tfrecord", [example(good), example(bad)], packed=False)
    with pytest.raises(DataError, match=rf"m\.tfrecord record 1: .*{problem}"):
        ingest(Ingest(open_source("movi", path), held_out=0), tmp_path / "out")
    result = ingest(Ingest(open_source("movi", path), held_out=0, skip_bad=True), tmp_path / "out")
    assert result.train is not None and result.train.num_samples == FRAMES and len(result.left_out) == 1
