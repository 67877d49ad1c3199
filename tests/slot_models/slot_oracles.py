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
    weights: Mapping[str, Tensor],
    inputs: Tensor,
    slots: Tensor,
    iters: int,
    eps: float = 1e-8,
    norm_eps: float = 1e-5,
    *,
    heads: int = 1,
    joint: bool = False,
    total: bool = False,
    input_mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
) -> Tensor:
    """Algorithm 1 of Locatello et al. 2020 from sums, products and exponentials: no module, no batched operation.

    Args:
        weights: of a slot attention of slot_models, by name; the biases of q, k and v, and combine_heads, if there.
        inputs: [B, N, C]; those that a mask excludes are left out before anything is computed.
        slots: initial ones [B, K, D]; likewise, and their place in the result is zero.
        heads, joint: a softmax over the slots of each head, or over the slots of all heads together.
        total: a weighted sum divided by N, rather than a weighted mean.

    Returns:
        [B, K, D].
    """

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ weights[f"to_{name}"].T
        return y + weights[f"{name}_bias"] if f"{name}_bias" in weights else y

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
    for image, (x, every) in enumerate(zip(inputs, slots, strict=True)):  # x [N, C], every [K, D]
        takes_part = torch.ones(len(every), dtype=torch.bool) if slot_mask is None else slot_mask[image]
        s = every[takes_part]
        x = norm(x if input_mask is None else x[input_mask[image]], "norm_inputs")
        keys, values = linear(x, "key").chunk(heads, dim=1), linear(x, "value").chunk(heads, dim=1)  # [N, d] each
        for _ in range(iters):
            prev = s
            queries = linear(norm(s, "norm_slots"), "query").chunk(heads, dim=1)  # [K, d] each
            attn = [(k @ q.T / k.shape[1] ** 0.5).exp() for k, q in zip(keys, queries, strict=True)]  # [N, K] each
            rivals = [a.sum(1, keepdim=True) for a in attn]
            attn = [a / (sum(rivals) if joint else rival) for a, rival in zip(attn, rivals, strict=True)]
            if total:
                attn = [a / len(x) for a in attn]
            else:
                attn = [(a + eps) / (a + eps).sum(0, keepdim=True) for a in attn]
            update = torch.cat([a.T @ v for a, v in zip(attn, values, strict=True)], dim=1)
            if "combine_heads.weight" in weights:
                update = update @ weights["combine_heads.weight"].T + weights["combine_heads.bias"]
            s = gru(update, prev)
            hidden = norm(s, "mlp.0") @ weights["mlp.1.weight"].T + weights["mlp.1.bias"]
            s = s + hidden.clamp(min=0) @ weights["mlp.3.weight"].T + weights["mlp.3.bias"]
        placed = torch.zeros_like(every)
        placed[takes_part] = s
        images.append(placed)
    return torch.stack(images)
