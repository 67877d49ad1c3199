"""Between pixels and what a model sees: crops, resizes, augmentation, normalisation.

Everything here is a pure function; what is random takes its noise as an argument. Only what makes or takes
tensors needs torch, and imports it itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

CLEVR_CROP = (slice(29, 221), slice(64, 256))
"""Rows and columns that are used of CLEVR's 240x320 images (Locatello et al. 2020, appendix E)."""

AUGMENTATION_NOISE = 4
"""Uniform numbers that `Augmentation` takes for a sample: flip, side of the crop, its row, its column."""


# --- crops and resizes -------------------------------------------------------------------------------------------


def crop_clevr(pixels: NDArray[Any]) -> NDArray[Any]:
    """CLEVR's published crop, rows 29:221 and columns 64:256. [240, 320, ...] -> [192, 192, ...].

    Raises:
        ValueError: the picture is not 240x320.
    """
    if pixels.shape[:2] != (240, 320):
        raise ValueError(f"the CLEVR crop is for pictures of 240x320, this one is {pixels.shape[0]}x{pixels.shape[1]}")
    return pixels[CLEVR_CROP]


def crop_centre(pixels: NDArray[Any]) -> NDArray[Any]:
    """The largest square in the middle. [H, W, ...] -> [S, S, ...] with S = min(H, W)."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def resize_bilinear(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Bilinear between pixel centres, without smoothing first: what the published CLEVR and ClevrTex pipelines do.

    The same as TensorFlow 2's `tf.image.resize` and torch's `interpolate(align_corners=False)`. A picture that shrinks
    to less than half loses detail to aliasing: photos are better off with Pillow's filters.

    Args:
        image: uint8 [H, W, C].
        size: (height, width).

    Returns:
        uint8 [*size, C], rounded to the nearest.
    """
    rows, lower, down = _neighbours(image.shape[0], size[0])
    columns, right, across = _neighbours(image.shape[1], size[1])
    pixels = image.astype(np.float32)
    tall = pixels[rows] + (pixels[lower] - pixels[rows]) * down[:, None, None]  # [h, W, C]
    wide = tall[:, columns] + (tall[:, right] - tall[:, columns]) * across[:, None]  # [h, w, C]
    rounded: NDArray[np.uint8] = np.floor(wide + np.float32(0.5)).astype(np.uint8)
    return rounded


def resize_nearest(ids: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """The id at each pixel's centre: ids are never mixed. [H, W, ...] -> [*size, ...]."""
    rows = (2 * np.arange(size[0]) + 1) * ids.shape[0] // (2 * size[0])  # [h], floor((i + 1/2) * H / h)
    columns = (2 * np.arange(size[1]) + 1) * ids.shape[1] // (2 * size[1])  # [w]
    picked: NDArray[Any] = ids[rows[:, None], columns]
    return picked


def _neighbours(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Of each new pixel: the old pixel at or before its centre, the one after, and how far it is between the two."""
    place = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0.0)  # [n]
    before = np.minimum(place.astype(np.int64), old - 1)
    return before, np.minimum(before + 1, old - 1), (place - before).astype(np.float32)


# --- augmentation ------------------------------------------------------------------------------------------------


def flip(pixels: NDArray[Any]) -> NDArray[Any]:
    """Left to right. [H, W, ...] -> [H, W, ...]."""
    return pixels[:, ::-1]


@dataclass(frozen=True)
class Augmentation:
    """Flips and crops of one sample, a pure function of its pixels and four uniform numbers.

    The crop is a rectangle of the image's own proportions, its side a uniform share of the image's, its place uniform
    over all that fit; it is resized back to the image's size. The default changes nothing.

    Fields:
        flip: probability of a flip from left to right.
        crop: (smallest, largest) side of the crop as a share of the image's side.

    Raises:
        ValueError: a field is out of range.
    """

    flip: float = 0.0
    crop: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip: {self.flip} is not a probability; use a number in [0, 1]")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(
                f"crop: {self.crop} is not a range (smallest, largest) within (0, 1]; reorder or shrink it"
            )

    @property
    def crops(self) -> bool:
        """Whether it may leave anything out of view."""
        return self.crop[0] < 1

    def __call__(
        self, image: NDArray[np.uint8], masks: NDArray[Any] | None, noise: NDArray[np.floating[Any]]
    ) -> tuple[NDArray[np.uint8], NDArray[Any] | None]:
        """Augment a sample.

        Args:
            image: uint8 [H, W, C].
            masks: integers [H, W], treated alike; ids stay as they are, and those outside the crop are gone.
            noise: [AUGMENTATION_NOISE] uniform in [0, 1).

        Returns:
            Image and masks of the sizes and dtypes that came in. What is left in view: `count_objects`.

        Raises:
            ValueError: image and masks differ in size, or the noise has another shape.
        """
        if noise.shape != (AUGMENTATION_NOISE,):
            raise ValueError(f"noise: {list(noise.shape)} is not [{AUGMENTATION_NOISE}]; draw that many a sample")
        if masks is not None and masks.shape != image.shape[:2]:
            raise ValueError(f"masks are {list(masks.shape)}, their image {list(image.shape[:2])}; they must be alike")
        size = (image.shape[0], image.shape[1])
        smallest, largest = self.crop
        share = smallest + (largest - smallest) * float(noise[1])
        height, width = (max(1, round(side * share)) for side in size)
        top = int(float(noise[2]) * (size[0] - height + 1))
        left = int(float(noise[3]) * (size[1] - width + 1))
        window = (slice(top, top + height), slice(left, left + width))
        image = image[window]
        masks = None if masks is None else masks[window]
        if float(noise[0]) < self.flip:
            image = flip(image)
            masks = None if masks is None else flip(masks)
        if (height, width) != size:
            image = resize_bilinear(image, size)
            masks = None if masks is None else resize_nearest(masks, size)
        return np.ascontiguousarray(image), None if masks is None else np.ascontiguousarray(masks)


def count_objects(masks: NDArray[Any]) -> int:
    """Distinct ids above 0, the background. Integers [H, W] -> number."""
    return int(np.count_nonzero(np.unique(masks)))


# --- normalisation -----------------------------------------------------------------------------------------------


def normalise(pixels: NDArray[np.uint8], mean: Sequence[float], deviation: Sequence[float]) -> NDArray[np.float32]:
    """(pixels / 255 - mean) / deviation, as pretrained encoders want it. uint8 [N, H, W, C] -> float32 [N, C, H, W].

    Args:
        mean, deviation: one a channel, of pixels in [0, 1].

    Raises:
        ValueError: not one mean and one positive deviation a channel.
    """
    channels = pixels.shape[-1]
    if len(mean) != channels or len(deviation) != channels or min(deviation) <= 0:
        raise ValueError(f"mean {list(mean)}, deviation {list(deviation)}: give {channels} of each, deviations > 0")
    scale = 1 / (255 * np.asarray(deviation, dtype=np.float64))
    shift = -np.asarray(mean, dtype=np.float64) / np.asarray(deviation, dtype=np.float64)
    scaled = pixels * scale.astype(np.float32) + shift.astype(np.float32)  # [N, H, W, C]
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def to_model(pixels: NDArray[np.uint8], memory: NDArray[np.float32] | None = None) -> "Tensor":
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1]: pixel / 127.5 - 1; in `memory`, if it is given."""
    import torch

    images = np.empty((len(pixels), 3, *pixels.shape[1:3]), dtype=np.float32) if memory is None else memory
    for image, scaled in zip(pixels, images, strict=True):  # image by image, while it is in the cache
        np.copyto(scaled, image.transpose(2, 0, 1))
        np.divide(scaled, np.float32(127.5), out=scaled)
        np.subtract(scaled, np.float32(1), out=scaled)
    return torch.from_numpy(images)


def on_device(pixels: "Tensor") -> "Tensor":
    """What `to_model` makes, bit for bit, from uint8 [N, H, W, 3] that lies on any device: a quarter of the bytes to
    move there. -> float32 [N, 3, H, W]."""
    import torch

    images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    # By a tensor: a GPU would multiply by the reciprocal of a plain number.
    return images.div_(torch.full((), 127.5, device=pixels.device)).sub_(1.0)


def to_pixels(images: "Tensor") -> NDArray[np.uint8]:
    """float [N, 3, H, W], clipped to [-1, 1] -> uint8 [N, H, W, 3]; undoes `to_model` exactly."""
    import torch

    scaled = images.detach().float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round()
    pixels: NDArray[np.uint8] = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels
