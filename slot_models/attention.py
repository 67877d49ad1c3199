"""Slot attention: slots compete for the inputs and are refined by a recurrent update."""

import math
from dataclasses import replace
from typing import Literal, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from slot_models.attend import Competition, Update
from slot_models.checks import check_choice, check_finite, check_mask, check_positive, check_shape, check_slots
from slot_models.iterations import passes, plain
from slot_models.iterations.derivative import refine
from slot_models.iterations.weights import Rules, Weights, absorbing

Initial = Literal["shared", "per_slot"]
Gradient = Literal["full", "bilevel", "implicit"]


class AttentionOptions(TypedDict, total=False):
    """What both modules below take by keyword.

    Fields:
        input_dim: C, width of the inputs; ``dim`` by default.
        initial: "shared" draws every slot from one learned Gaussian, as published; "per_slot" learns a mean for each
            slot (BO-QSA, Jia et al. 2023), which fixes K.
        initial_sigma: what the standard deviation of the initial slots starts at; drawn like the mean by default.
        gradient: "full" goes through all iterations; "implicit" through the last one alone (Chang et al. 2022);
            "bilevel" too, with a straight-through path to the initial slots (BO-QSA).
        update: what a slot takes of its inputs: their weighted "mean", as published, or "sum" over N, which
            generalises to more slots than were trained (Krimmel et al. 2024).
        qkv_bias: biases of queries, keys and values; the original has none.
        norm_eps: epsilon of the LayerNorms (1e-3 in the original's Keras).
        seed: keys the fixed noise of evaluation.
    """

    input_dim: int | None
    initial: Initial
    initial_sigma: float | None
    gradient: Gradient
    update: Update
    qkv_bias: bool
    norm_eps: float
    seed: int


class Refined(NamedTuple):
    """Slots and how they were found.

    slots: float [B, K, D].
    attention: float [B, K, N], what each slot won of each input in the last iteration; sums to 1 over the slots.
    """

    slots: Tensor
    attention: Tensor


class _IterativeAttention(nn.Module):
    """The loop that SlotAttention and MultiHeadSlotAttention share; see there."""

    def __init__(
        self,
        num_slots: int,
        dim: int,
        iters: int,
        eps: float,
        hidden_dim: int,
        heads: int,
        dim_head: int,
        competition: Competition,
        project: bool,
        *,
        input_dim: int | None = None,
        initial: Initial = "shared",
        initial_sigma: float | None = None,
        gradient: Gradient = "full",
        update: Update = "mean",
        qkv_bias: bool = False,
        norm_eps: float = 1e-5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        input_dim = dim if input_dim is None else input_dim
        check_positive(
            num_slots=num_slots, dim=dim, iters=iters, hidden_dim=hidden_dim, input_dim=input_dim, heads=heads,
            dim_head=dim_head,
        )  # fmt: skip
        for name, value, choices in (
            ("initial", initial, Initial),
            ("gradient", gradient, Gradient),
            ("update", update, Update),
            ("competition", competition, Competition),
        ):
            check_choice(name, value, choices)
        for name, epsilon in {"eps": eps, "norm_eps": norm_eps}.items():
            if not epsilon >= 0:
                raise ValueError(f"{name}: {epsilon} is negative")
        if initial_sigma is not None and not initial_sigma > 0:
            raise ValueError(f"initial_sigma: {initial_sigma} is not positive")
        self.num_slots, self.dim, self.iters, self.eps = num_slots, dim, iters, eps
        self.heads, self.scale = heads, dim_head**-0.5
        self.competition, self.update, self.gradient, self.seed = competition, update, gradient, seed
        self.initial, self.initial_sigma = initial, initial_sigma
        self.checks_values = True  # whether NaN in the inputs is named; off inside a model that checks its own

        initial_slots = num_slots if initial == "per_slot" else 1
        self.slots_mu = nn.Parameter(torch.empty(initial_slots, dim))
        self.slots_log_sigma = nn.Parameter(torch.empty(initial_slots, dim))
        # Plain parameters, not Linear modules: forward reads the matrices themselves, and ZeRO-3 gathers a parameter
        # for the module that owns it.
        width = heads * dim_head
        self.to_query = nn.Parameter(torch.empty(width, dim))
        self.to_key = nn.Parameter(torch.empty(width, input_dim))
        self.to_value = nn.Parameter(torch.empty(width, input_dim))
        for name in ("query_bias", "key_bias", "value_bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(width)) if qkv_bias else None)
        self.query_bias: nn.Parameter | None
        self.key_bias: nn.Parameter | None
        self.value_bias: nn.Parameter | None
        self.combine_heads = nn.Linear(width, dim) if project else None
        self.norm_inputs = nn.LayerNorm(input_dim, eps=norm_eps)
        self.norm_slots = nn.LayerNorm(dim, eps=norm_eps)
        self.gru = nn.GRUCell(dim if project else width, dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim, eps=norm_eps), nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim)
        )
        self.fixed_noise: Tensor
        self.register_buffer("fixed_noise", fixed_noise(num_slots, dim, seed), persistent=False)
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
        for bias in (self.gru.bias_ih, self.gru.bias_hh, self.query_bias, self.key_bias, self.value_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for layer in (*self.mlp, self.combine_heads):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def initial_slots(self, batch: int, num_slots: int, noise: Tensor | None) -> Tensor:
        """mu + sigma * noise; without noise, the fixed noise of evaluation, the same for every image. [B, K, D]"""
        check_positive(num_slots=num_slots)
        if self.initial == "per_slot" and num_slots != self.num_slots:
            raise ValueError(f"num_slots: {num_slots} differs from the {self.num_slots} learned initial slots")
        if noise is None:
            known = num_slots <= self.num_slots  # fewer slots take the first rows
            noise = self.fixed_noise[:num_slots] if known else fixed_noise(num_slots, self.dim, self.seed)
            noise = noise.expand(batch, -1, -1)
        check_shape("noise", noise, (batch, num_slots, self.dim))
        return self.slots_mu + self.slots_log_sigma.exp() * noise.to(self.slots_mu)

    def forward(
        self,
        inputs: Tensor,
        num_slots: int | None = None,
        *,
        slots: Tensor | None = None,
        noise: Tensor | None = None,
        input_mask: Tensor | None = None,
        slot_mask: Tensor | None = None,
        input_noise: Tensor | None = None,
        return_attention: bool = False,
    ) -> Tensor | Refined:
        """Finds the slots of a set of inputs.

        Args:
            inputs: float [B, N, C].
            num_slots: K for this call.
            slots: initial slots [B, K, D], instead of drawn ones; they decide K, and take no noise.
            noise: standard normal [B, K, D] of the initial slots; a fixed draw where it is not given, so that a result
                never depends on the batch around it or on a generator's state.
            input_mask: bool [B, N], the inputs that count; the others have no effect, whatever they hold.
            slot_mask: bool [B, K], the slots that compete; the others win no input.
            input_noise: float [B, T, N, C], added to the normalised inputs of each iteration (see MetaSlotAttention).
            return_attention: also return the attention of the last iteration.

        Returns:
            float [B, K, D], or Refined(slots, attention).

        Raises:
            ValueError: a shape or dtype does not fit, there are no slots, an argument holds NaN or infinity, or has no
                effect beside another.
        """
        check_shape("inputs", inputs, ("B", "N", self.to_key.shape[1]))
        batch, count, width = inputs.shape
        if input_mask is not None:
            check_mask("input_mask", input_mask, (batch, count))
            inputs = inputs.masked_fill(~input_mask[..., None], 0.0)
        given = {"inputs": inputs, "slots": slots, "noise": noise, "input_noise": input_noise}
        if slots is None:
            slots = self.initial_slots(batch, self.num_slots if num_slots is None else num_slots, noise)  # [B, K, D]
        else:
            check_slots("slots", slots, self.dim)
            check_shape("slots", slots, (batch, "K" if num_slots is None else num_slots, self.dim))
            if noise is not None:
                raise ValueError("noise: the initial slots are given, so it has no effect; leave one of the two out")
        if slot_mask is not None:
            check_mask("slot_mask", slot_mask, tuple(slots.shape[:2]))
        if input_noise is not None:
            check_shape("input_noise", input_noise, (batch, self.iters, count, width))

        def iterate(slots: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
            noise = None if input_noise is None else input_noise[:, start:stop]
            return self._iterate(inputs, slots, stop - start, input_mask, slot_mask, noise, return_attention)

        last = 0
        if self.gradient != "full":
            initial, last = slots, self.iters - 1
            if last:
                with torch.no_grad():
                    slots, _ = iterate(slots, 0, last)
            if self.gradient == "bilevel":
                slots = slots.detach() + (initial - initial.detach())  # adds an exact zero
            else:
                slots = slots.detach() + 0.0 * initial  # a gradient of zero: ZeRO-3 would repeat the last one otherwise
        slots, attention = iterate(slots, last, self.iters)
        if self.checks_values:
            check_finite(slots, **given)
        if not return_attention:
            return slots
        assert attention is not None
        return Refined(slots, attention)

    def _iterate(
        self,
        inputs: Tensor,
        slots: Tensor,
        iterations: int,
        input_mask: Tensor | None,
        slot_mask: Tensor | None,
        input_noise: Tensor | None,
        return_attention: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Slots [B, K, D], and attention [B, K, N] if asked for, from so many iterations."""
        weights, masks = self._weights(), (input_mask, slot_mask)
        rules = replace(self._rules(slots.shape[1]), iterations=iterations)
        if input_noise is not None or not passes.fit(inputs, slots, rules, weights):
            return plain.iterate(inputs, slots, weights, rules, *masks, input_noise)
        if not return_attention:
            return refine(inputs, slots, weights, rules, *masks), None
        if iterations > 1:
            slots = refine(inputs, slots, weights, replace(rules, iterations=iterations - 1), *masks)
        rules = replace(rules, iterations=1)
        return refine(inputs, slots, weights, rules, *masks), plain.attention(inputs, slots, weights, rules, *masks)

    def _rules(self, num_slots: int) -> Rules:
        width, heads = self.to_key.shape[1], self.heads
        return Rules(
            iterations=self.iters,
            absorb=absorbing(self.iters, heads, num_slots, width, len(self.to_key) // heads),
            heads=heads,
            scale=self.scale,
            eps=self.eps,
            norm_eps=self.norm_inputs.eps,
            competition=self.competition,
            update=self.update,
        )

    def _weights(self) -> Weights:
        """Those of the modules below are read here: what they hold is theirs, what is done with it is not."""
        combine, norm_mlp, hidden, out = self.combine_heads, self.mlp[0], self.mlp[1], self.mlp[3]
        assert isinstance(norm_mlp, nn.LayerNorm) and isinstance(hidden, nn.Linear) and isinstance(out, nn.Linear)
        return Weights(
            norm_inputs=self.norm_inputs.weight,
            norm_inputs_bias=self.norm_inputs.bias,
            norm_slots=self.norm_slots.weight,
            norm_slots_bias=self.norm_slots.bias,
            to_query=self.to_query,
            query_bias=self.query_bias,
            to_key=self.to_key,
            key_bias=self.key_bias,
            to_value=self.to_value,
            value_bias=self.value_bias,
            combine=None if combine is None else combine.weight,
            combine_bias=None if combine is None else combine.bias,
            gru_inputs=self.gru.weight_ih,
            gru_hidden=self.gru.weight_hh,
            gru_inputs_bias=self.gru.bias_ih,
            gru_hidden_bias=self.gru.bias_hh,
            norm_mlp=norm_mlp.weight,
            norm_mlp_bias=norm_mlp.bias,
            mlp_hidden=hidden.weight,
            mlp_hidden_bias=hidden.bias,
            mlp_out=out.weight,
            mlp_out_bias=out.bias,
        )


class SlotAttention(_IterativeAttention):
    """Slot attention (Locatello et al. 2020, algorithm 1): ``slots = attention(inputs)``, [B, N, C] -> [B, K, D].

    Args:
        num_slots: K, the number of slots unless the call says otherwise.
        dim: D, the width of a slot.
        iters: T, the number of refinements.
        eps: added to the attention after the softmax over slots.
        hidden_dim: width of the hidden layer of the slots' MLP.
        options: see AttentionOptions.

    Raises:
        ValueError: a size is not positive, or an option is none of its choices.
    """

    def __init__(
        self,
        num_slots: int,
        dim: int,
        iters: int = 3,
        eps: float = 1e-8,
        hidden_dim: int = 128,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(num_slots, dim, iters, eps, hidden_dim, 1, dim, "per_head", False, **options)


class MultiHeadSlotAttention(_IterativeAttention):
    """Slot attention with several heads, in either published meaning.

    Args:
        num_slots, dim, iters, eps, hidden_dim: as for SlotAttention.
        heads: H.
        dim_head: width of a head's queries, keys and values.
        competition: "per_head": slots compete in each head on its own, then a projection combines the heads (the
            package slot-attention). "joint": one softmax over all slots and heads, and no projection (SLATE, Singh et
            al. 2022; SPOT; OCLF).
        options: see AttentionOptions.

    Raises:
        ValueError: a size is not positive, or an option is none of its choices.
    """

    def __init__(
        self,
        num_slots: int,
        dim: int,
        heads: int = 4,
        dim_head: int = 64,
        iters: int = 3,
        eps: float = 1e-8,
        hidden_dim: int = 128,
        *,
        competition: Competition = "per_head",
        **options: Unpack[AttentionOptions],
    ) -> None:
        project = competition == "per_head"
        super().__init__(num_slots, dim, iters, eps, hidden_dim, heads, dim_head, competition, project, **options)


def fixed_noise(num_slots: int, dim: int, seed: int = 0) -> Tensor:
    """The slot initialisation of evaluation: a function of (seed, slot) alone.

    Returns:
        float32 standard normal [num_slots, dim]; row k is the same for every num_slots above k.
    """
    rows = [np.random.Generator(np.random.Philox(key=[seed, slot])) for slot in range(num_slots)]
    return torch.from_numpy(np.stack([row.standard_normal(dim, dtype=np.float32) for row in rows]))
