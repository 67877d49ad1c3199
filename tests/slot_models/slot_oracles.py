"""Slot attention as its equations, written out one image at a time; and how far apart two tensors are."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in parts of the largest expected entry; 0 where both are all zero."""
    assert actual.shape == expected.shape
    difference, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    return difference / largest if largest else difference


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Moves every parameter off its initial value, so that zero biases and unit scales hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def gradients(loss: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(tensors, found, strict=True) if gradient is not None}


def gradient_distance(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest distance of a gradient to what is expected under its name.

    Some gradients are zero but for rounding (the softmax over slots does not see the bias of norm_slots, which all
    slots share), so no gradient is measured in parts of less than 1e-4 of the largest one.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-4 * max(gradient.abs().max().item() for gradient in expected.values())
    return max(
        (actual[name] - gradient).abs().max().item() / max(gradient.abs().max().item(), floor)
        for name, gradient in expected.items()
    )


def published_slot_attention(
    weights: Mapping[str, Tensor], inputs: Tensor, slots: Tensor, iters: int, eps: float = 1e-8, norm_eps: float = 1e-5
) -> Tensor:
    """Algorithm 1 of Locatello et al. 2020 from sums, products and exponentials: no module, no batched operation.

    Args:
        weights: of a slot_models.SlotAttention, by name.
        inputs: [B, N, C].
        slots: initial ones [B, K, D].

    Returns:
        [B, K, D].
    """

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        return centred / (variance + norm_eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gru(x: Tensor, h: Tensor) -> Tensor:
        from_x = (x @ weights["gru.weight_ih"].T + weights["gru.bias_ih"]).split(h.shape[-1], dim=-1)
        from_h = (h @ weights["gru.weight_hh"].T + weights["gru.bias_hh"]).split(h.shape[-1], dim=-1)
        reset, update = (1 / (1 + (-(from_x[i] + from_h[i])).exp()) for i in (0, 1))
        new = (from_x[2] + reset * from_h[2]).tanh()
        return (1 - update) * new + update * h

    images = []
    for x, s in zip(inputs, slots, strict=True):  # x [N, C], s [K, D]
        x = norm(x, "norm_inputs")
        k, v = x @ weights["to_key"].T, x @ weights["to_value"].T  # [N, D]
        for _ in range(iters):
            prev = s
            q = norm(s, "norm_slots") @ weights["to_query"].T / s.shape[-1] ** 0.5  # [K, D]
            attn = (k @ q.T).exp()  # [N, K]
            attn = attn / attn.sum(1, keepdim=True) + eps
            attn = attn / attn.sum(0, keepdim=True)
            s = gru(attn.T @ v, prev)
            hidden = norm(s, "mlp.0") @ weights["mlp.1.weight"].T + weights["mlp.1.bias"]
            s = s + hidden.clamp(min=0) @ weights["mlp.3.weight"].T + weights["mlp.3.bias"]
        images.append(s)
    return torch.stack(images)
