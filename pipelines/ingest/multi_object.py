"""DeepMind's multi-object data sets: Tetrominoes, Multi-dSprites, Objects Room, CLEVR with masks.

https://github.com/google-deepmind/multi_object_datasets. A scene has one mask a plane and entity, entity 0 being the
background (in Objects Room the first four are: sky, floor and two walls). Here the planes become one label map:

* a pixel belongs to the entity whose plane is largest there; where all are zero, and between equals, to the first;
* where the set has `visibility`, entities with 0 are padding; the i-th other foreground entity has label i and is the
  i-th value of each factor, whether any of its pixels is in view or not, and `num_objects` counts them;
* Objects Room has neither: the objects in view are counted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.ingest.example import Feature, required
from pipelines.ingest.picture import BadRecord, Picture


@dataclass(frozen=True)
class MultiObject:
    """One of the sets, as its publisher's reader describes it.

    Fields:
        format: its name.
        height, width, channels: of the image.
        entities: planes of the mask; None takes what is there.
        entity_last: the mask is [H, W, E, 1], not [E, H, W, 1].
        background: how many of the first entities are background.
    """

    format: str
    height: int
    width: int
    channels: int = 3
    entities: int | None = None
    entity_last: bool = False
    background: int = 1

    def count(self, features: Mapping[str, Feature]) -> int:
        """A record is one scene."""
        return 1

    def pictures(self, features: Mapping[str, Feature]) -> Iterator[Picture]:
        """The scene.

        Raises:
            BadRecord: a feature is missing or has another size.
        """
        pixels = self.height * self.width
        image = required(features, "image").bytes_array()
        if len(image) != pixels * self.channels:
            shape = f"{self.height}x{self.width}x{self.channels}"
            raise BadRecord(f"feature image: {len(image)} values, {self.format} has {shape}")
        image = np.broadcast_to(image.reshape(self.height, self.width, -1), (self.height, self.width, 3))
        planes = self._planes(required(features, "mask").bytes_array())  # [E, H, W]
        owner = planes.argmax(axis=0)  # [H, W] the entity of each pixel
        if "visibility" not in features:
            yield Picture(image, np.maximum(owner - (self.background - 1), 0))
            return
        visible = required(features, "visibility").numbers()  # [E]
        if len(visible) != len(planes):
            raise BadRecord(f"feature visibility: {len(visible)} values for {len(planes)} entities")
        objects = np.flatnonzero(visible[self.background :]) + self.background  # [n] entities that exist
        label = np.zeros(len(planes), dtype=np.uint8)
        label[objects] = np.arange(1, len(objects) + 1)
        yield Picture(
            image=image,
            masks=label[owner],
            num_objects=len(objects),
            factors={
                name: _per_entity(feature, len(planes))[objects].tolist()
                for name, feature in sorted(features.items())
                if name not in ("image", "mask", "visibility")
            },
        )

    def _planes(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        pixels = self.height * self.width
        entities, rest = divmod(len(mask), pixels)
        if rest or entities < self.background or (self.entities or entities) != entities or entities > 255:
            wanted = f"{self.entities or 'some'} planes of {self.height}x{self.width}"
            raise BadRecord(f"feature mask: {len(mask)} values, {self.format} has {wanted}")
        if self.entity_last:
            return mask.reshape(self.height, self.width, entities).transpose(2, 0, 1)
        return mask.reshape(entities, self.height, self.width)


def _per_entity(feature: Feature, entities: int) -> NDArray[Any]:
    """[E] or [E, k]."""
    values = feature.numbers()
    if not len(values) or len(values) % entities:
        raise BadRecord(f"feature {feature.name}: {len(values)} values for {entities} entities")
    return values if len(values) == entities else values.reshape(entities, -1)


MULTI_OBJECT = {
    layout.format: layout
    for layout in (
        MultiObject("tetrominoes", 35, 35, entities=4),
        MultiObject("multi-dsprites-binarized", 64, 64, channels=1, entities=4, entity_last=True),
        MultiObject("multi-dsprites-on-grayscale", 64, 64, entities=6, entity_last=True),
        MultiObject("multi-dsprites-on-colored", 64, 64, entities=5, entity_last=True),
        MultiObject("objects-room", 64, 64, background=4),
        MultiObject("clevr-with-masks", 240, 320, entities=11),
    )
}
"""The published sets by name."""
