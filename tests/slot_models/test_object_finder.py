"""From pixels to objects: against the autoencoder itself, and Pillow for images of another size."""

from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from slot_models import FeatureEncoder, MLPPatchDecoder, ObjectFinder, SlotAttention, SlotAutoencoder, build_autoencoder

SIDE = 12
MODEL: dict[str, Any] = {"image_size": SIDE, "num_slots": 3, "slot_dim": 16, "gate": {}}


def pictures(count: int, height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


@pytest.fixture
def finder() -> ObjectFinder:
    torch.manual_seed(0)
    return ObjectFinder(build_autoencoder(**MODEL), SIDE, background_slots=1)


@torch.no_grad()
def test_at_the_models_size_it_says_what_the_model_says(finder: ObjectFinder) -> None:
    images = pictures(4)
    floats = (images.numpy().astype(np.float64) / 127.5 - 1).astype(np.float32)
    expected = finder.model(torch.from_numpy(floats).permute(0, 3, 1, 2).contiguous())
    found = finder(images)
    torch.testing.assert_close(found["masks"], expected.masks, atol=1e-6, rtol=0)
    torch.testing.assert_close(found["slots"], expected.slots, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["keep_probability"], expected.keep_probability, atol=1e-6, rtol=0)
    assert found["keep"].tolist() == (expected.keep == 1).tolist()
    assert found["count"].tolist() == [max(0, int(keep.sum()) - 1) for keep in expected.keep]
    drawn = (expected.reconstruction.clamp(-1, 1).double() + 1) * 127.5
    difference = found["reconstruction"].double() - rearrange(drawn, "b c h w -> b h w c")
    assert difference.abs().max() <= 0.501
    assert {name: value.dtype for name, value in found.items()} == {
        "masks": torch.float32,
        "keep": torch.bool,
        "keep_probability": torch.float32,
        "slots": torch.float32,
        "count": torch.int64,
        "reconstruction": torch.uint8,
    }


@pytest.mark.parametrize(("height", "width"), [(40, 25), (8, 100), (9, 11), (SIDE, 30)])
@torch.no_grad()
def test_an_image_of_any_size_is_resized_as_pillow_does_it(finder: ObjectFinder, height: int, width: int) -> None:
    seen: list[Tensor] = []
    finder.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = pictures(2, height, width)
    found = finder(images)
    for image, given in zip(images, seen[0], strict=True):
        resized = Image.fromarray(image.numpy()).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        pixels = (rearrange(given, "c h w -> h w c") + 1) * 127.5
        assert (pixels - torch.from_numpy(np.asarray(resized).astype(np.float32))).abs().max() <= 1.01  # it rounds
    assert found["masks"].shape == (2, 3, height, width)
    assert found["reconstruction"].shape == (2, height, width, 3)


@torch.no_grad()
def test_an_image_is_found_the_same_whatever_stands_beside_it(finder: ObjectFinder) -> None:
    images = pictures(6)
    together = finder(images)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    other = finder(images[order])
    for name, values in together.items():
        torch.testing.assert_close(other[name].double(), values[order].double(), rtol=1e-5, atol=1e-5)
        alone = torch.cat([finder(image[None])[name] for image in images])
        torch.testing.assert_close(alone.double(), values.double(), rtol=1e-5, atol=1e-5)


class Patches(nn.Module):
    """A backbone: the mean colour of each quarter."""

    grid, dim = (2, 2), 3

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(nn.functional.adaptive_avg_pool2d(images, 2), "b c h w -> b (h w) c")


def test_a_model_of_features_draws_no_image() -> None:
    attention = SlotAttention(3, 16)
    model = SlotAutoencoder(FeatureEncoder(3, 16), attention, None, MLPPatchDecoder(16, 3, 2), backbone=Patches())  # type: ignore[arg-type]
    with torch.no_grad():
        found = ObjectFinder(model, SIDE)(pictures(2))
    assert found.keys() == {"masks", "keep", "keep_probability", "slots", "count"}
    assert found["masks"].shape == (2, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (pictures(1).float(), "dtype torch.float32"),
        (pictures(1)[0], r"is not \[B, H, W, 3\]"),
        (pictures(1)[..., :2], r"is not \[B, H, W, 3\]"),
        (pictures(1, 7, 9), "a side of 7 pixels is not between 8 and 2048"),
        (torch.zeros(1, 8, 2049, 3, dtype=torch.uint8), "a side of 2049 pixels"),
    ],
)
def test_other_arrays_are_refused(finder: ObjectFinder, images: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        finder(images)
