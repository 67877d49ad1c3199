"""ObjectFinder: a trained autoencoder as its users see it, from images of any size to the objects in them."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from slot_models.autoencoder import SlotAutoencoder, SlotOutput
from slot_models.checks import check_shape

SIDES = (8, 2048)
"""The least and the most pixels that a side of an image may have."""


class ObjectFinder(nn.Module):
    """Finds the objects in uint8 images, without noise: a result is a function of the image and the weights.

    An image of another size than the model's is resized as a whole, smoothed where it shrinks, whatever its aspect
    ratio, and masks and reconstruction come back at the image's size. Cut it to a square first where objects must keep
    their proportions.

    Args:
        model: the autoencoder, trained.
        image_size: S, pixels a side that it was trained on.
        background_slots: kept slots that hold no object.
    """

    def __init__(self, model: SlotAutoencoder, image_size: int, background_slots: int = 0) -> None:
        super().__init__()
        self.model, self.image_size, self.background_slots = model, image_size, background_slots
        self.scale: Tensor  # a tensor: a GPU would multiply by the reciprocal of a plain number
        self.register_buffer("scale", torch.tensor(127.5), persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Finds the objects.

        Args:
            images: uint8 [B, H, W, 3], H and W from 8 to 2048.

        Returns:
            masks: float32 [B, K, H, W], each slot's share of each pixel; dropped slots have none.
            keep: bool [B, K], whether the image needs the slot.
            keep_probability: float32 [B, K].
            slots: float32 [B, K, D].
            count: int64 [B], objects: kept slots less the background's.
            reconstruction: uint8 [B, H, W, 3], the image as the slots draw it; absent where they draw features.

        Raises:
            ValueError: they are not.
        """
        output = self.look(images)
        height, width = images.shape[1:3]
        keep = output.keep > 0.5
        found = {
            "masks": output.masks_at(height, width),
            "keep": keep,
            "keep_probability": output.keep_probability,
            "slots": output.slots,
            "count": (keep.sum(dim=1) - self.background_slots).clamp(min=0),
        }
        if self.model.backbone is None:
            found["reconstruction"] = self._pixels(output.reconstruction, height, width)
        return found

    def look(self, images: Tensor) -> SlotOutput:
        """What the model itself says of uint8 images [B, H, W, 3], at its own size.

        Raises:
            ValueError: they are not such images, or a side is out of range.
        """
        check_shape("images", images, ("B", "H", "W", 3))
        if images.dtype != torch.uint8:
            raise ValueError(f"images: dtype {images.dtype} is not torch.uint8; give pixels from 0 to 255")
        for side in images.shape[1:3]:
            if not SIDES[0] <= side <= SIDES[1]:
                raise ValueError(
                    f"images: a side of {side} pixels is not between {SIDES[0]} and {SIDES[1]}; resize them first"
                )
        pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # [B, 3, H, W]
        return self.see(pixels / self.scale - 1)

    def see(self, images: Tensor) -> SlotOutput:
        """The same of float images [B, 3, H, W] in [-1, 1]."""
        if tuple(images.shape[-2:]) != (self.image_size, self.image_size):
            square = (self.image_size, self.image_size)
            images = functional.interpolate(images, square, mode="bilinear", antialias=True)  # [B, 3, S, S]
        output: SlotOutput = self.model(images)
        return output

    def _pixels(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """float [B, 3, S, S] -> uint8 [B, height, width, 3]"""
        if tuple(drawn.shape[-2:]) != (height, width):
            drawn = functional.interpolate(drawn, (height, width), mode="bilinear", align_corners=False)
        pixels = ((drawn.clamp(-1, 1) + 1) * self.scale).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous()
