"""Decoders of patch features in which every slot draws on its own."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from slot_models.checks import check_positive
from slot_models.decoders import MixtureDecoder
from slot_models.encoders import glorot
from slot_models.mixture import MIXTURE_EPS
from slot_models.positions import Size, height_width


class MLPPatchDecoder(MixtureDecoder):
    """Broadcasts each slot over the patches, adds a learned position code, and runs an MLP on each (DINOSAUR).

    Seitzer et al. 2023, section 3.2: three hidden layers of 1024 (COCO: 2048), the last output is the mask logit. The
    first layer sees slot + position and is linear before its ReLU, so it is applied to K slots and N positions rather
    than to K x N sums: exact, and D x hidden x K x N multiplications fewer for each image.

    Args:
        slot_dim: D.
        features: F, width of the features.
        grid: patches a side, or (height, width).
        hidden_dim: width of the hidden layers.
        layers: number of hidden layers.
        mixture_eps: see MixtureDecoder.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        slot_dim: int,
        features: int,
        grid: Size,
        hidden_dim: int = 1024,
        layers: int = 3,
        mixture_eps: float = MIXTURE_EPS,
    ) -> None:
        super().__init__(slot_dim, mixture_eps)
        self.grid = height, width = height_width(grid)
        check_positive(features=features, grid=min(self.grid), hidden_dim=hidden_dim, layers=layers)
        self.features = features
        self.position = nn.Parameter(torch.empty(height * width, slot_dim))
        # The first layer is this module's own: forward uses it twice, and ZeRO-3 gathers a parameter for the module
        # that owns it.
        self.first_weight = nn.Parameter(torch.empty(hidden_dim, slot_dim))
        self.first_bias = nn.Parameter(torch.zeros(hidden_dim))
        hidden: list[nn.Module] = []
        for _ in range(layers - 1):
            hidden += [nn.Linear(hidden_dim, hidden_dim), nn.ReLU(inplace=True)]
        self.rest = nn.Sequential(*hidden, nn.Linear(hidden_dim, features + 1))
        glorot(self)
        nn.init.xavier_uniform_(self.first_weight)
        nn.init.normal_(self.position, std=0.02)

    def decode(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """slots [B, K, D] -> pictures [B, K, F, h, w], mask logits [B, K, h, w]."""
        shared = functional.linear(self.position, self.first_weight, self.first_bias)  # [N, hidden]
        own = functional.linear(slots, self.first_weight)  # [B, K, hidden]
        patches = self.rest((own[:, :, None] + shared).relu_())  # [B, K, N, F + 1]
        patches = rearrange(patches, "b k (h w) f -> b k f h w", h=self.grid[0])
        return patches[:, :, :-1], patches[:, :, -1]
