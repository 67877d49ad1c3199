"""Slot attention: slots compete for the inputs and are refined by a recurrent update."""

import math
from typing import Literal

import numpy as np
import torch
from einops import einsum
from torch import Tensor, nn

Initial = Literal["shared", "per_slot"]
Gradient = Literal["full", "bilevel"]


class SlotAttention(nn.Module):
    """Slot attention (Locatello et al. 2020, algorithm 1).

    Keys and values are never formed: ``logits = x (W_k^T q)`` and ``updates = W_v (attention^T x)`` are the same
    maths with the projections applied to K slots rather than to N inputs.

    Args:
        num_slots: K, the number of slots unless the call says otherwise.
        dim: D, the width of a slot.
        iters: T, the number of refinements.
        eps: added to the attention after the softmax over slots.
        hidden_dim: width of the hidden layer of the slots' MLP.
        input_dim: width of the inputs; ``dim`` by default.
        initial: "shared" draws every slot from one learned Gaussian, as published; "per_slot" learns a mean for each
            slot (BO-QSA, Jia et al. 2023), which fixes K.
        initial_sigma: what the standard deviation of the initial slots starts at; drawn like the mean by default.
        gradient: "full" goes through all iterations; "bilevel" through the last one alone, with a straight-through
            path to the initial slots (BO-QSA).
        norm_eps: epsilon of the LayerNorms (1e-3 in the original's Keras).
        seed: keys the fixed noise of evaluation.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        num_slots: int,
        dim: int,
        iters: int = 3,
        eps: float = 1e-8,
        hidden_dim: int = 128,
        *,
        input_dim: int | None = None,
        initial: Initial = "shared",
        initial_sigma: float | None = None,
        gradient: Gradient = "full",
        norm_eps: float = 1e-5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        input_dim = dim if input_dim is None else input_dim
        sizes = {"num_slots": num_slots, "dim": dim, "iters": iters, "hidden_dim": hidden_dim, "input_dim": input_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: {size} is not positive")
        if initial_sigma is not None and not initial_sigma > 0:
            raise ValueError(f"initial_sigma: {initial_sigma} is not positive")
        self.num_slots, self.dim, self.iters, self.eps = num_slots, dim, iters, eps
        self.initial, self.initial_sigma, self.gradient, self.seed = initial, initial_sigma, gradient, seed
        self.scale = dim**-0.5

        initial_slots = num_slots if initial == "per_slot" else 1
        self.slots_mu = nn.Parameter(torch.empty(initial_slots, dim))
        self.slots_log_sigma = nn.Parameter(torch.empty(initial_slots, dim))
        # Plain parameters, not Linear modules: forward reads the matrices themselves, and ZeRO-3 gathers a parameter
        # for the module that owns it.
        self.to_query = nn.Parameter(torch.empty(dim, dim))
        self.to_key = nn.Parameter(torch.empty(dim, input_dim))
        self.to_value = nn.Parameter(torch.empty(dim, input_dim))
        self.norm_inputs = nn.LayerNorm(input_dim, eps=norm_eps)
        self.norm_slots = nn.LayerNorm(dim, eps=norm_eps)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim, eps=norm_eps), nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot kernels, orthogonal recurrent kernel, zero biases (the original's initialisers)."""
        bound = (6 / (1 + self.dim)) ** 0.5  # Keras' glorot takes fan_in = 1 and fan_out = D on [1, 1, D]
        for parameter in (self.slots_mu, self.slots_log_sigma):
            nn.init.uniform_(parameter, -bound, bound)
        if self.initial_sigma is not None:
            nn.init.constant_(self.slots_log_sigma, math.log(self.initial_sigma))
        for parameter in (self.to_query, self.to_key, self.to_value):
            nn.init.xavier_uniform_(parameter)
        nn.init.xavier_uniform_(self.gru.weight_ih)  # over the three gates at once, as Keras does
        nn.init.orthogonal_(self.gru.weight_hh)
        for bias in (self.gru.bias_ih, self.gru.bias_hh):
            nn.init.zeros_(bias)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def initial_slots(self, batch: int, num_slots: int, noise: Tensor | None) -> Tensor:
        """mu + sigma * noise; without noise, the fixed noise of evaluation, the same for every image. [B, K, D]"""
        if num_slots < 1:
            raise ValueError(f"num_slots: {num_slots} is not positive")
        if self.initial == "per_slot" and num_slots != self.num_slots:
            raise ValueError(f"num_slots: {num_slots} differs from the {self.num_slots} learned initial slots")
        if noise is None:
            noise = fixed_noise(num_slots, self.dim, self.seed).expand(batch, -1, -1)
        noise = noise.to(self.slots_mu)
        if noise.shape != (batch, num_slots, self.dim):
            raise ValueError(f"noise: shape {tuple(noise.shape)} is not {(batch, num_slots, self.dim)}")
        return self.slots_mu + self.slots_log_sigma.exp() * noise

    def forward(
        self, inputs: Tensor, num_slots: int | None = None, *, slots: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Finds the slots of a set of inputs.

        Args:
            inputs: float [B, N, input_dim].
            num_slots: K for this call.
            slots: initial slots [B, K, D], instead of drawn ones.
            noise: standard normal [B, K, D] of the initial slots; a fixed draw where it is not given, so that a result
                never depends on the batch around it or on a generator's state.

        Returns:
            float [B, K, D].

        Raises:
            ValueError: a shape does not fit.
        """
        if inputs.dim() != 3 or inputs.shape[-1] != self.to_key.shape[1]:
            raise ValueError(f"inputs: shape {tuple(inputs.shape)} is not [B, N, {self.to_key.shape[1]}]")
        inputs = self.norm_inputs(inputs)  # [B, N, C]
        if slots is None:
            count = self.num_slots if num_slots is None else num_slots
            slots = self.initial_slots(inputs.shape[0], count, noise)  # [B, K, D]
        if slots.dim() != 3 or slots.shape[0] != inputs.shape[0] or slots.shape[2] != self.dim:
            raise ValueError(f"slots: shape {tuple(slots.shape)} is not {(inputs.shape[0], 'K', self.dim)}")
        initial = slots

        for iteration in range(self.iters):
            if self.gradient == "bilevel" and iteration == self.iters - 1:
                slots = slots.detach() + (initial - initial.detach())  # adds an exact zero
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._learns(iteration)):
                slots = self._refine(slots, inputs)
        return slots

    def _learns(self, iteration: int) -> bool:
        return self.gradient == "full" or iteration == self.iters - 1

    def _refine(self, slots: Tensor, inputs: Tensor) -> Tensor:
        queries = self.norm_slots(slots) @ self.to_query.T * self.scale  # [B, K, D]
        queries = queries @ self.to_key  # [B, K, C]
        logits = einsum(queries, inputs, "b k c, b n c -> b k n")
        attention = logits.float().softmax(dim=1) if logits.dtype != torch.float64 else logits.softmax(dim=1)
        attention = attention + self.eps  # in fp32 at least: eps is zero in half precision
        attention = (attention / attention.sum(dim=2, keepdim=True)).to(inputs.dtype)
        pooled = einsum(attention, inputs, "b k n, b n c -> b k c")
        updates = pooled @ self.to_value.T  # [B, K, D]
        batch = slots.shape[0]
        slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).unflatten(0, (batch, -1))
        refined: Tensor = slots + self.mlp(slots)
        return refined


def fixed_noise(num_slots: int, dim: int, seed: int = 0) -> Tensor:
    """The slot initialisation of evaluation: a function of (seed, slot) alone.

    Returns:
        float32 standard normal [num_slots, dim]; row k is the same for every num_slots above k.
    """
    rows = [np.random.Generator(np.random.Philox(key=[seed, slot])) for slot in range(num_slots)]
    return torch.from_numpy(np.stack([row.standard_normal(dim, dtype=np.float32) for row in rows]))
