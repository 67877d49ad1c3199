"""What a decoder is; and the spatial broadcast decoder, which draws a picture and a mask of each slot."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from slot_models.broadcast import Broadcast, convolution_taps
from slot_models.checks import check_choice, check_positive, check_shape, check_slots
from slot_models.encoders import glorot
from slot_models.mixture import MIXTURE_EPS, masked_mixture
from slot_models.positions import Size, coordinates, height_width
from slot_models.precision import at_least_float

MaskCell = Literal["pixel", "cell"]


class Decoded(NamedTuple):
    """What a decoder makes of slots, float32 at least.

    reconstruction: float [B, C, H, W], of an image, or of features on a grid of patches.
    masks: float [B, K, H, W], each slot's share of each position; dropped slots have none.
    pictures: float [B, K, C, H, W], what each slot draws; None where slots draw nothing of their own. In evaluation a
        dropped slot's means nothing.
    mask_logits: float [B, K, H, W], before the softmax over slots; None likewise, and likewise for a dropped slot.
    """

    reconstruction: Tensor
    masks: Tensor
    pictures: Tensor | None
    mask_logits: Tensor | None


class Decoder(nn.Module, ABC):
    """Slots, and which of them are kept, to a reconstruction.

    Args:
        slot_dim: D, width of a slot.

    Raises:
        ValueError: it is not positive.
    """

    def __init__(self, slot_dim: int) -> None:
        super().__init__()
        check_positive(slot_dim=slot_dim)
        self.slot_dim = slot_dim

    @abstractmethod
    def forward(self, slots: Tensor, keep: Tensor, target: Tensor | None = None) -> Decoded:
        """Decodes.

        Args:
            slots: float [B, K, D].
            keep: float [B, K], 0 or 1; a dropped slot has no part in the reconstruction.
            target: float [B, C, H, W], what is to be reconstructed, for decoders that go along it.

        Raises:
            ValueError: a shape does not fit, there are no slots, or a target is missing.
        """

    def check(self, slots: Tensor, keep: Tensor) -> None:
        check_slots("slots", slots, self.slot_dim)
        check_shape("keep", keep, tuple(slots.shape[:2]))


class MixtureDecoder(Decoder):
    """Every slot draws a picture and mask logits on its own; the reconstruction mixes the pictures of the kept ones.

    Mixture and softmax are in float32 at least, under autocast too. In evaluation mode dropped slots are not decoded,
    so the mixture is the published one's limit for an epsilon of 0 (see masked_mixture).

    Args:
        mixture_eps: of masked_mixture, in training; 0 leaves no trace of a dropped slot's mask.

    Raises:
        ValueError: it is negative.
    """

    recompute = False
    """Set to True, one slot after the other is decoded, and again in the backward pass, so that the activations of one
    are in memory rather than of all. The result is the same; a step takes one more forward pass of the decoder."""

    def __init__(self, slot_dim: int, mixture_eps: float = MIXTURE_EPS) -> None:
        super().__init__(slot_dim)
        if not mixture_eps >= 0:
            raise ValueError(f"mixture_eps: {mixture_eps} is negative")
        self.mixture_eps = mixture_eps

    @property
    def eps(self) -> float:
        """The mixture's epsilon in this mode."""
        return self.mixture_eps if self.training else 0.0

    @abstractmethod
    def decode(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """slots [B, K, D] -> pictures [B, K, C, H, W], mask logits [B, K, H, W]."""

    def forward(self, slots: Tensor, keep: Tensor, target: Tensor | None = None) -> Decoded:
        """See Decoder; the target is not looked at."""
        self.check(slots, keep)
        if self.training:
            pictures, mask_logits = self._recomputed(slots) if self.recompute else self.decode(slots)
        else:
            pictures, mask_logits = self._decode_kept(slots, keep.detach() > 0)
        pictures, mask_logits = at_least_float(pictures), at_least_float(mask_logits)
        masks = masked_mixture(mask_logits, keep, self.eps)  # [B, K, H, W]
        reconstruction = (masks[:, :, None] * pictures).sum(dim=1)  # [B, C, H, W]; no einsum: autocast would round it
        return Decoded(reconstruction, masks, pictures, mask_logits)

    def _recomputed(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            checkpoint(self.decode, slot, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn
            for slot in torch.split(slots, 1, dim=1)
        ]
        pictures, mask_logits = zip(*parts, strict=True)
        return torch.cat(pictures, dim=1), torch.cat(mask_logits, dim=1)

    def _decode_kept(self, slots: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What the kept slots (bool [B, K]) draw, and nothing for the others: the kept ones of all images together.

        A traced graph, which knows no values, decodes all; so does a backward pass, for the slope of keeping a slot.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or bool(kept.all()) or not bool(kept.any()):
            return self.decode(slots)
        parts = self.decode(slots[kept][None])  # [1, kept slots, ...]
        pictures, mask_logits = (part.new_zeros(*kept.shape, *part.shape[2:]) for part in parts)
        pictures[kept], mask_logits[kept] = (part.squeeze(0) for part in parts)
        return pictures, mask_logits


class SpatialBroadcastDecoder(MixtureDecoder):
    """Broadcasts each slot over a grid, adds a position code and convolves (Watters et al. 2019).

    With ``patch = 1`` the grid is the image, as published for Tetrominoes and Multi-dSprites; with a larger patch the
    last layer writes patch x patch pixels for each grid cell. CLEVR's is UpsamplingBroadcastDecoder.

    The first layer does without the grid (see slot_models/broadcast.py): exact, and it removes most of that layer's
    arithmetic.

    Args:
        slot_dim: D.
        grid: cells a side, or (height, width).
        channels: width of the hidden layers.
        layers: number of hidden layers.
        kernel: odd size of their kernels, at most ``grid``.
        output_kernel: odd size of the last layer's kernel.
        patch: pixels a side that one cell becomes.
        mask: a mask logit for each "pixel", or one for each "cell", shared by its pixels, as decoders of patch
            features have (DINOSAUR, Seitzer et al. 2023).
        mixture_eps: see MixtureDecoder.

    Raises:
        ValueError: a size is not positive, or a kernel is even or wider than the grid.
    """

    def __init__(
        self,
        slot_dim: int,
        grid: Size,
        channels: int = 32,
        layers: int = 3,
        kernel: int = 5,
        output_kernel: int = 3,
        patch: int = 1,
        mask: MaskCell = "pixel",
        mixture_eps: float = MIXTURE_EPS,
    ) -> None:
        super().__init__(slot_dim, mixture_eps)
        self.grid = height, width = height_width(grid)
        check_positive(grid=min(self.grid), channels=channels, layers=layers, patch=patch)
        for name, size in {"kernel": kernel, "output_kernel": output_kernel}.items():
            if size % 2 == 0 or not 0 < size <= min(self.grid):
                raise ValueError(f"{name}: {size} is not an odd number up to the grid's {min(self.grid)}")
        check_choice("mask", mask, MaskCell)
        self.patch, self.mask, self.padding = patch, mask, kernel // 2
        self.position = nn.Linear(4, slot_dim)
        # The first layer's kernel is this module's own parameter: forward uses it twice, and ZeRO-3 gathers a
        # parameter for the module that owns it.
        self.first_weight = nn.Parameter(torch.empty(channels, slot_dim, kernel, kernel))
        self.first_bias = nn.Parameter(torch.zeros(channels))
        hidden: list[nn.Module] = []
        for _ in range(layers - 1):
            hidden += [nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.ReLU(inplace=True)]
        self.hidden = nn.Sequential(*hidden)
        outputs = 4 * patch**2 if mask == "pixel" else 3 * patch**2 + 1
        self.output = nn.Conv2d(channels, outputs, output_kernel, padding=output_kernel // 2)
        glorot(self)
        nn.init.xavier_uniform_(self.first_weight)

        self.broadcast = Broadcast(convolution_taps(height, kernel), convolution_taps(width, kernel))
        self.coordinates: Tensor
        self.register_buffer("coordinates", coordinates(height, width), persistent=False)

    def decode(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """slots [B, K, D] -> pictures [B, K, 3, H, W], mask logits [B, K, H, W]."""
        position = rearrange(self.position(self.coordinates), "h w d -> 1 d h w")
        shared = functional.conv2d(position, self.first_weight, self.first_bias, padding=self.padding)  # [1, C, G, G]
        kernel = rearrange(self.first_weight, "c d i j -> d c i j")
        hidden = self.broadcast(slots.flatten(0, 1), kernel, shared)  # [BK, C, G, G]
        cells = self.output(self.hidden(hidden)).unflatten(0, (-1, slots.shape[1]))  # [B, K, outputs, G, G]
        colours = 3 * self.patch**2
        if self.patch == 1:
            return cells[:, :, :colours], cells[:, :, colours]
        pictures = functional.pixel_shuffle(cells[:, :, :colours], self.patch)  # [B, K, 3, H, W]
        if self.mask == "cell":
            logits = repeat(cells[:, :, colours], "b k h w -> b k (h p) (w q)", p=self.patch, q=self.patch)
        else:
            logits = functional.pixel_shuffle(cells[:, :, colours:], self.patch).squeeze(2)
        return pictures, logits  # [B, K, 3, H, W], [B, K, H, W]
