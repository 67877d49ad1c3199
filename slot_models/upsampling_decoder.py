"""The spatial broadcast decoder that starts from a small grid and grows, as published for CLEVR."""

import math
from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn

from slot_models.broadcast import Broadcast, transposed_taps
from slot_models.checks import check_positive
from slot_models.decoders import MixtureDecoder
from slot_models.encoders import glorot
from slot_models.mixture import MIXTURE_EPS
from slot_models.positions import Size, coordinates, height_width
from slot_models.same_padding import TurnedConvTranspose2d


class BroadcastConvTranspose2d(TurnedConvTranspose2d):
    """A transposed convolution of slots that are broadcast over a grid, plus a position code, and its ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, grid: tuple[int, int]) -> None:
        super().__init__(inputs, outputs, kernel, stride)
        rows, columns = (transposed_taps(size, kernel, stride, self.before) for size in grid)
        self.broadcast = Broadcast(rows, columns)

    def forward(self, slots: Tensor, position: Tensor) -> Tensor:  # type: ignore[override]
        """slots [N, D], turned position code [1, D, h, w] -> turned [N, C, h stride, w stride]."""
        hidden: Tensor = self.broadcast(slots, self.turned_weight(), super().forward(position))
        return hidden


class UpsamplingBroadcastDecoder(MixtureDecoder):
    """Broadcasts each slot over a small grid, adds a position code, and upsamples (Locatello et al. 2020, table 5).

    The defaults are CLEVR's: 8 x 8 cells, four transposed convolutions that double them, one that does not, and a last
    one to colours and mask logit; all with TensorFlow's SAME padding.

    Args:
        slot_dim: D.
        image_size: pixels a side, or (height, width), of the reconstruction.
        channels: width of the hidden layers.
        strides: one for each hidden layer; their product divides the image's sides, and what is left is the grid.
        kernel: odd size of the hidden layers' kernels, no less than a stride.
        output_kernel: odd size of the last layer's kernel.
        mixture_eps: see MixtureDecoder.

    Raises:
        ValueError: a size is not positive or does not fit.
    """

    def __init__(
        self,
        slot_dim: int,
        image_size: Size = 128,
        channels: int = 64,
        strides: Sequence[int] = (2, 2, 2, 2, 1),
        kernel: int = 5,
        output_kernel: int = 3,
        mixture_eps: float = MIXTURE_EPS,
    ) -> None:
        super().__init__(slot_dim, mixture_eps)
        height, width = height_width(image_size)
        check_positive(image_size=min(height, width), channels=channels)
        if not strides:
            raise ValueError("strides: there are none; give one for each hidden layer")
        for stride in strides:
            check_positive(strides=stride)
        for name, size in {"kernel": kernel, "output_kernel": output_kernel}.items():
            if size % 2 == 0 or size < 1:
                raise ValueError(f"{name}: {size} is not an odd positive number")
        factor = math.prod(strides)
        for size in (height, width):
            if size % factor:
                raise ValueError(f"strides: their product {factor} does not divide the image's {size} pixels")
        self.grid = (height // factor, width // factor)
        self.position = nn.Linear(4, slot_dim)
        layers: list[nn.Module] = []
        for stride in strides[1:]:
            layers += [TurnedConvTranspose2d(channels, channels, kernel, stride), nn.ReLU(inplace=True)]
        first = BroadcastConvTranspose2d(slot_dim, channels, kernel, strides[0], self.grid)
        # An Identity for the first layer's own ReLU, so that each stride has two entries.
        self.layers = nn.Sequential(first, nn.Identity(), *layers, TurnedConvTranspose2d(channels, 4, output_kernel))
        glorot(self)
        self.coordinates: Tensor
        self.register_buffer("coordinates", coordinates(*self.grid).flip(0, 1), persistent=False)  # turned

    def decode(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """slots [B, K, D] -> pictures [B, K, 3, H, W], mask logits [B, K, H, W]."""
        position = rearrange(self.position(self.coordinates), "h w d -> 1 d h w")
        first, *rest = self.layers
        hidden = first(slots.flatten(0, 1), position)  # turned by 180 degrees up to the last layer
        for layer in rest:
            hidden = layer(hidden)
        pixels = hidden.flip(2, 3).unflatten(0, (-1, slots.shape[1]))  # [B, K, 4, H, W]
        return pixels[:, :, :3], pixels[:, :, 3]
