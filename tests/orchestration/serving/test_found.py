"""What is told: run lengths against pycocotools, a label map against the masks, a batch against single images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from served import SIDE, photo

from orchestration.registry.loading import load_module
from orchestration.serving.finder import Finder, ModelName
from orchestration.serving.found import Found, png


def invented(seed: int, keep: list[bool], height: int = 7, width: int = 5) -> Found:
    random = np.random.Generator(np.random.Philox(key=[seed, 3]))
    masks = random.dirichlet(np.ones(len(keep)), (height, width)).transpose(2, 0, 1).astype(np.float32)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    kept = np.array(keep)
    return Found(image, int(kept.sum()), kept, np.where(kept, 0.9, 0.1).astype(np.float32), masks)


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_are_cocos(seed: int) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    found = invented(seed, [True, seed % 2 == 0, True])
    labels = found.labels()
    told = found.run_lengths()
    assert [entry["slot"] for entry in told] == np.flatnonzero(found.keep).tolist()
    for entry in told:
        packed = coco.frPyObjects({"size": entry["size"], "counts": entry["counts"]}, *entry["size"])
        np.testing.assert_array_equal(coco.decode(packed).astype(bool), labels == entry["slot"] + 1)


def test_a_slot_without_a_pixel_has_one_run() -> None:
    found = invented(1, [True, True])
    nothing = Found(found.image, 2, found.keep, found.keep_probability, np.stack([np.ones((7, 5)), np.zeros((7, 5))]))
    assert [entry["counts"] for entry in nothing.run_lengths()] == [[0, 35], [35]]


def test_labels_name_the_kept_slot_with_the_largest_share() -> None:
    found = invented(4, [True, False, True])
    expected = torch.from_numpy(found.masks[[0, 2]]).argmax(dim=0) * 2 + 1
    np.testing.assert_array_equal(found.labels(), expected)
    assert not invented(4, [False, False, False]).labels().any()


def test_pictures_are_png() -> None:
    found = invented(5, [True, False])
    for pixels in (found.labels(), found.overlay(), found.strip()):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)
    assert found.overlay(enlarge=False).shape == (7, 5, 3)
    assert found.overlay().shape == (280, 200, 3)


def test_an_image_is_told_the_same_in_any_batch(model: ModelName) -> None:
    images = np.stack([photo(number) for number in range(13)])
    alone = [Finder.of(model).find(image[None])[0] for image in images]
    assert len({found.objects for found in alone}) > 1
    for batch in (1, 4, 13):
        for one, found in zip(alone, Finder.of(model, batch).find(images), strict=True):
            np.testing.assert_array_equal(found.labels(), one.labels())
            np.testing.assert_array_equal(found.keep, one.keep)
            np.testing.assert_allclose(found.masks, one.masks, atol=1e-6)


def test_what_is_told_is_what_the_torch_module_says(model: ModelName, finder: Finder) -> None:
    images = np.stack([photo(number) for number in range(3)])
    expected = load_module(model.uri, model.tracking)(torch.from_numpy(images))
    for number, found in enumerate(finder.find(images)):
        assert found.objects == int(expected["count"][number])
        np.testing.assert_allclose(found.masks, expected["masks"][number].detach(), atol=1e-6)
        assert found.facts()["keep"] == expected["keep"][number].tolist()
        np.testing.assert_allclose(sum(found.facts()["mask_share"]), 1, atol=1e-5)
    assert finder.side == SIDE


def test_an_alias_is_pinned_to_its_version(store: str, model: ModelName) -> None:
    assert ModelName("models:/slotforge-served@champion", store).pinned() == model
    for uri in ("runs:/abc/model", "/tmp/model", "https://example.org/model", "models:/m-0123"):
        with pytest.raises(ValueError, match="not a model of the registry"):
            ModelName(uri, store).pinned()


def test_weights_only_says_the_same(model: ModelName, finder: Finder) -> None:
    image = photo(1)[None]
    (other,) = Finder.of(ModelName(model.uri, model.tracking, weights_only=True)).find(image)
    np.testing.assert_array_equal(other.masks, finder.find(image)[0].masks)
