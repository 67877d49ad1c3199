"""A transformer that predicts each patch from those before it and from the slots."""

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional

from slot_models.checks import check_positive, check_shape
from slot_models.decoders import Decoded, Decoder
from slot_models.encoders import glorot
from slot_models.mixture import kept_softmax
from slot_models.positions import Size, height_width
from slot_models.precision import at_least_float


class TransformerDecoder(Decoder):
    """Autoregressive decoder of patch features (SLATE, Singh et al. 2022; DINOSAUR, Seitzer et al. 2023).

    Patches are predicted in row order. Position t sees the true features of the positions before it (teacher forcing,
    with a learned token before the first) and all kept slots: causal self-attention, attention to the slots, an MLP,
    each after a LayerNorm and added to what it was given. At inference teacher forcing stays, so a reconstruction uses
    the image's own features; nothing is generated from slots alone. Slots draw no pictures: the masks are the last
    layer's attention to the slots, averaged over the heads.

    Softmax over slots is in float32 at least. There is no dropout: nothing here draws random numbers.

    Args:
        slot_dim: D.
        features: F, width of the features.
        grid: patches a side, or (height, width).
        dim: width of the transformer; ``features`` by default.
        layers: number of blocks.
        heads: of each attention; they divide ``dim``.
        hidden_dim: width of the blocks' MLPs; 4 x ``dim`` by default.

    Raises:
        ValueError: a size is not positive, or heads do not divide dim.
    """

    def __init__(
        self,
        slot_dim: int,
        features: int,
        grid: Size,
        dim: int | None = None,
        layers: int = 4,
        heads: int = 4,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__(slot_dim)
        dim = features if dim is None else dim
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.grid = height, width = height_width(grid)
        check_positive(
            features=features, grid=min(self.grid), dim=dim, layers=layers, heads=heads, hidden_dim=hidden_dim
        )
        if dim % heads:
            raise ValueError(f"heads: {heads} does not divide dim {dim}")
        self.features = features
        self.embed_slots = nn.Sequential(nn.Linear(slot_dim, dim, bias=False), nn.LayerNorm(dim))
        self.embed_features = nn.Linear(features, dim)
        self.first = nn.Parameter(torch.empty(dim))  # stands before the first patch
        self.position = nn.Parameter(torch.empty(height * width, dim))
        self.blocks = nn.ModuleList(_Block(dim, heads, hidden_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, features)
        glorot(self)
        for parameter in (self.first, self.position):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, slots: Tensor, keep: Tensor, target: Tensor | None = None) -> Decoded:
        """Decodes; see Decoder. The target [B, F, h, w] is needed."""
        self.check(slots, keep)
        if target is None:
            raise ValueError("target: it is missing; a transformer decoder is fed the features that it predicts")
        check_shape("target", target, (slots.shape[0], self.features, *self.grid))
        memory = self.embed_slots(slots)  # [B, K, dim]
        before = self.embed_features(rearrange(target, "b f h w -> b (h w) f")[:, :-1])  # [B, N - 1, dim]
        first = self.first.to(before.dtype).expand(slots.shape[0], 1, -1)
        hidden = torch.cat([first, before], dim=1) + self.position  # [B, N, dim]
        for block in self.blocks:
            hidden, weights = block(hidden, memory, keep)  # [B, N, dim], [B, heads, N, K]
        patches = at_least_float(self.output(self.norm(hidden)))  # [B, N, F]
        reconstruction = rearrange(patches, "b (h w) f -> b f h w", h=self.grid[0])
        masks = rearrange(weights.mean(dim=1), "b (h w) k -> b k h w", h=self.grid[0])
        return Decoded(reconstruction, masks, None, None)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm_self, self.norm_slots, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = _CausalAttention(dim, heads)
        self.slot_attention = _SlotReading(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))

    def forward(self, hidden: Tensor, memory: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden + self.self_attention(self.norm_self(hidden))
        read, weights = self.slot_attention(self.norm_slots(hidden), memory, keep)
        hidden = hidden + read
        return hidden + self.mlp(self.norm_mlp(hidden)), weights


class _CausalAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_all = nn.Linear(dim, 3 * dim, bias=False)  # queries, keys, values
        self.combine = nn.Linear(dim, dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, N, dim] -> [B, N, dim]; a position sees itself and those before it."""
        queries, keys, values = rearrange(
            self.to_all(hidden), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads
        )
        seen = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        combined: Tensor = self.combine(rearrange(seen, "b heads n d -> b n (heads d)"))
        return combined


class _SlotReading(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.combine = nn.Linear(dim, dim, bias=False)

    def forward(self, hidden: Tensor, memory: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [B, N, dim], memory [B, K, dim], keep [B, K] -> [B, N, dim], weights [B, heads, N, K]."""
        queries = rearrange(self.to_query(hidden), "b n (heads d) -> b heads n d", heads=self.heads)
        keys, values = rearrange(
            self.to_key_value(memory), "b k (two heads d) -> two b heads k d", two=2, heads=self.heads
        )
        logits = at_least_float(einsum(queries, keys, "b heads n d, b heads k d -> b heads n k")) * self.scale
        weights = kept_softmax(logits, keep[:, None, None], dim=-1)  # [B, heads, N, K]
        read = einsum(weights.to(values.dtype), values, "b heads n k, b heads k d -> b heads n d")
        return self.combine(rearrange(read, "b heads n d -> b n (heads d)")), weights
