"""What decoding a step is, and the decoder that does it where it is asked."""

import json
import mmap
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.decoding.memory import Layout
from pipelines.noise import Purpose, generator
from pipelines.samples import UNKNOWN, BadSample, decode
from pipelines.transforms import AUGMENTATION_NOISE, Augmentation, count_objects

Members = Mapping[str, bytes]
Found = int | str | None
"""What decoding a sample finds: how many objects it has (-1: unknown), why it is bad, or None: it was not decoded."""


@dataclass(frozen=True)
class Decoding:
    """From members to pixels: a pure function of the bytes, the step and the place.

    Fields:
        size: (height, width) of every image.
        with_masks: decode the masks too, which must be there.
        augment: what is done to every sample; None leaves them as they are.
        seed: of the augmentation's noise.
    """

    size: tuple[int, int]
    with_masks: bool = False
    augment: Augmentation | None = None
    seed: int = 0

    def fill(
        self, members: Members, step: int, place: int, image: NDArray[np.uint8], masks: NDArray[np.uint16]
    ) -> Found:
        """Decode a sample into `image` [H, W, 3] and, where they are wanted, `masks` [H, W].

        Returns:
            The number of objects in view, -1 where that is unknown, or why the sample can never be one.
        """
        try:
            sample = decode(members, self.with_masks, self.size, image)
        except BadSample as error:
            return str(error)
        pixels, ids, count = sample.image, sample.masks, sample.num_objects
        if self.augment is not None:
            noise = generator(self.seed, Purpose.AUGMENTATION, step, place).random(AUGMENTATION_NOISE)
            pixels, ids = self.augment(pixels, ids, noise)
            if self.augment.crops:  # objects may be out of view now
                count = UNKNOWN if ids is None or count == UNKNOWN else count_objects(ids)
        if pixels is not image:
            image[...] = pixels
        if ids is not None:
            masks[...] = ids
        return count

    def fill_rows(
        self,
        samples: Sequence[Members | None],
        step: int,
        place: int,
        images: NDArray[np.uint8],
        masks: NDArray[np.uint16],
    ) -> list[Found]:
        """The one decode loop: samples, of which the first stands at `place`, into rows; None leaves its row out."""
        nothing = masks[:0]
        return [
            None
            if members is None
            else self.fill(members, step, place + row, images[row], masks[row] if self.with_masks else nothing)
            for row, members in enumerate(samples)
        ]

    def text(self) -> str:
        """JSON that `Decoding.of` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> "Decoding":
        """The decoding that a `text` tells."""
        fields = json.loads(text)
        if (augment := fields["augment"]) is not None:
            augment = Augmentation(augment["flip"], tuple(augment["crop"]))
        return cls(tuple(fields["size"]), fields["with_masks"], augment, fields["seed"])


@dataclass(frozen=True, slots=True)
class Decoded:
    """The samples of a step. Rows that hold no good sample, and those beyond the samples, are for the caller to fill.

    Fields:
        images: uint8 [rows, H, W, 3].
        masks: uint16 [rows, H, W]; no rows where they are not wanted.
        found: what was found in each sample.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.uint16]
    found: list[Found]


class Decoder(Protocol):
    """Decodes steps in order."""

    def submit(self, samples: Sequence[Members | None], step: int, place: int) -> None:
        """Take a step's samples to decode, of which the first stands at a place; None leaves its row out."""

    def take(self) -> Decoded:
        """The oldest step that was submitted and not taken yet. Its arrays are good until `release`."""

    def release(self) -> None:
        """The oldest step that was taken is not needed any more."""

    def close(self) -> None:
        """End what was started, and forget what was submitted."""


class InThread:
    """Decodes where it is asked.

    Args:
        decoding: what is done.
        rows: the most samples of a step.
    """

    def __init__(self, decoding: Decoding, rows: int) -> None:
        self._decoding = decoding
        layout = Layout(rows, decoding.size, decoding.with_masks)
        self._images, self._masks = layout.views(mmap.mmap(-1, layout.bytes))
        self._submitted: deque[tuple[Sequence[Members | None], int, int]] = deque()

    def submit(self, samples: Sequence[Members | None], step: int, place: int) -> None:
        self._submitted.append((samples, step, place))

    def take(self) -> Decoded:
        found = self._decoding.fill_rows(*self._submitted.popleft(), self._images, self._masks)
        return Decoded(self._images, self._masks, found)

    def release(self) -> None:
        pass

    def close(self) -> None:
        self._submitted.clear()
