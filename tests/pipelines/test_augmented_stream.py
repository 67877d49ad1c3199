"""Augmentation in a stream: a function of (seed, step, place), whoever reads and decodes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.noise import Purpose, generator
from pipelines.plan import Plan
from pipelines.samples import encode
from pipelines.shards import read_index, write_index, write_shard
from pipelines.stream import Stream
from pipelines.transforms import Augmentation, on_device, to_model, to_pixels

SIDE, COUNT, SEED = 16, 29, 9
AUGMENT = Augmentation(flip=0.5, crop=(0.4, 0.9))


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of noise, and masks of four objects, one in each corner: some leave a crop's view."""
    image = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    ids = np.zeros((SIDE, SIDE), dtype=np.uint16)
    for corner, (row, column) in enumerate([(0, 0), (0, -3), (-3, 0), (-3, -3)]):
        ids[row : row + 3 or None, column : column + 3 or None] = corner + 1 + 300 * (number % 2)
    return image, ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards, number = [], 0
    for shard, count in enumerate([11, 3, 15]):
        samples = []
        for row in range(count):
            samples.append(encode(f"s{shard}r{row}", *scene(number), {"num_objects": 4}))
            number += 1
        shards.append(write_shard(tmp_path, f"{shard}.tar", samples))
    write_index(tmp_path, shards, {})
    return tmp_path


def plan_of(folder: Path) -> Plan:
    return Plan(read_index(folder), batch_size=8, seed=3, lanes=4, window=2)


def rows(folder: Path, world: int, decode_workers: int = 0, **changes) -> dict[tuple[int, int], tuple]:  # type: ignore[no-untyped-def, type-arg]
    """(image, masks, objects, sample) by (step, place) over two epochs."""
    plan = plan_of(folder)
    settings = {"with_masks": True, "augment": AUGMENT} | changes
    found = {}
    for rank in range(world):
        with Stream(
            plan,
            folder,
            rank=rank,
            world=world,
            micro_batch=3,
            seed=SEED,
            noise={},
            decode_workers=decode_workers,
            **settings,
        ) as stream:
            for step in range(2 * plan.steps_per_epoch):
                for micro in stream.step(step):
                    for i in np.flatnonzero(micro.weight.numpy()):
                        masks = None if micro.masks is None else micro.masks[i].numpy()
                        found[step, int(micro.places[i])] = (
                            micro.images[i],
                            masks,
                            int(micro.num_objects[i]),
                            int(micro.ids[i]),
                        )
    return found


def by_hand(number: int, step: int, place: int) -> tuple[np.ndarray, np.ndarray]:
    """What the docstring of `Augmentation` says, with Pillow for the resizes."""
    flip, side, row, column = generator(SEED, Purpose.AUGMENTATION, step, place).random(4)
    image, ids = scene(number)
    share = round(SIDE * (0.4 + (0.9 - 0.4) * side))
    top, left = int(row * (SIDE - share + 1)), int(column * (SIDE - share + 1))
    image, ids = image[top : top + share, left : left + share], ids[top : top + share, left : left + share]
    if flip < 0.5:
        image, ids = np.fliplr(image), np.fliplr(ids)
    large = Image.fromarray(np.ascontiguousarray(image)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    nearest = torch.from_numpy(ids.astype(np.float32))[None, None]
    ids = torch.nn.functional.interpolate(nearest, size=(SIDE, SIDE), mode="nearest-exact")[0, 0].numpy()
    return np.asarray(large), ids.astype(np.int64)


def test_every_sample_is_augmented_with_the_noise_of_its_step_and_place(folder: Path) -> None:
    found = rows(folder, 1)
    assert len(found) == 2 * COUNT
    for (step, place), (image, masks, objects, number) in found.items():
        expected, ids = by_hand(number, step, place)
        pixels = to_pixels(image[None])[0].astype(int)
        assert np.abs(pixels - expected).max() <= 1  # Pillow rounds in between
        assert np.array_equal(masks, ids)
        assert objects == len(set(np.unique(ids)) - {0})
    assert len({objects for _, _, objects, _ in found.values()}) > 1
    # An epoch later the same sample looks different.
    first = {number: image for (step, _), (image, _, _, number) in found.items() if step < 4}
    again = {number: image for (step, _), (image, _, _, number) in found.items() if step >= 4}
    assert sum(torch.equal(first[number], again[number]) for number in first) <= 1


@pytest.mark.parametrize(("world", "decode_workers"), [(5, 0), (2, 1)])
def test_the_pixels_are_the_same_in_any_world_and_however_they_are_decoded(
    folder: Path, world: int, decode_workers: int
) -> None:
    alone, other = rows(folder, 1), rows(folder, world, decode_workers)
    assert alone.keys() == other.keys()
    for at, (image, masks, objects, number) in alone.items():
        assert torch.equal(other[at][0], image) and np.array_equal(other[at][1], masks)
        assert other[at][2:] == (objects, number)


def test_a_filled_place_keeps_its_own_noise(folder: Path) -> None:
    bad = 13
    shard = [encode(f"s1r{row}", *scene(11 + row), {"num_objects": 4}) for row in range(3)]
    shard[bad - 11]["image.png"] = b"not a picture"
    index = read_index(folder)
    write_index(folder, [index.shards[0], write_shard(folder, "1.tar", shard), index.shards[2]], {})
    found = rows(folder, 2)
    assert len(found) == 2 * COUNT and bad not in {number for *_, number in found.values()}
    for (step, place), (image, masks, _, number) in found.items():
        expected, ids = by_hand(number, step, place)
        assert np.abs(to_pixels(image[None])[0].astype(int) - expected).max() <= 1 and np.array_equal(masks, ids)


def test_objects_in_view_are_counted_or_unknown(folder: Path) -> None:
    def counts(**changes) -> set[int]:  # type: ignore[no-untyped-def]
        return {objects for _, _, objects, _ in rows(folder, 1, **changes).values()}

    assert counts(with_masks=False) == {-1}
    assert counts(with_masks=False, augment=Augmentation(flip=0.5)) == {4} == counts(augment=Augmentation(flip=1.0))
    assert counts(with_masks=False, augment=None) == {4}


def test_a_flip_alone_is_a_flip(folder: Path) -> None:
    plain, flipped = rows(folder, 1, augment=None), rows(folder, 1, augment=Augmentation(flip=1.0))
    for at, (image, masks, _, number) in plain.items():
        pixels, ids = scene(number)
        assert torch.equal(image, to_model(pixels[None])[0]) and np.array_equal(masks, ids)  # ids above 255 too
        assert torch.equal(flipped[at][0], image.flip(-1)) and np.array_equal(flipped[at][1], masks[:, ::-1])


def test_a_device_makes_the_same_floats_of_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 9, 3), dtype=np.uint8)
    pixels[0] = np.arange(189).reshape(7, 9, 3)
    made = on_device(torch.from_numpy(pixels))
    assert made.is_contiguous() and torch.equal(made, to_model(pixels))
    table = torch.arange(256).float().div(127.5).sub(1)  # the formula, by every value
    assert torch.equal(made, table[torch.from_numpy(pixels).long()].permute(0, 3, 1, 2))
