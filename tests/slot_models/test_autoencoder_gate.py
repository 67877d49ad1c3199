"""What the decision to keep a slot does to the reconstruction, and what the gate learns from it."""

from functools import partial
from typing import Any

import pytest
import torch
from autoencoders import (
    SMALL,
    blocks,
    build,
    error_of,
    loss_of,
    noises,
)
from einops import einsum
from slot_oracles import distance, randomise
from torch import Tensor

from slot_models.autoencoder import SlotAutoencoder


def half_dropped(seed: int, **options: Any) -> tuple[SlotAutoencoder, tuple[Tensor, Tensor, Tensor]]:
    """A model in float64, and images and noises with which its gate keeps some slots and drops others."""
    model = build(SMALL | options, seed).double()
    randomise(model, seed)
    slot_noise, gate_noise = noises(SMALL, 6, seed)
    arguments = (blocks(6, 9).double(), slot_noise.double(), gate_noise.double())
    keep = model(*arguments).keep
    assert 0 < keep.mean() < 1
    return model, arguments


@pytest.mark.parametrize("seed", range(3))
def test_a_reconstruction_mixes_the_pictures_of_the_kept_slots_alone(seed: int) -> None:
    model, arguments = half_dropped(seed)
    output = model(*arguments)
    _, mask_logits = model.decoder.decode(output.slots)
    for image in range(6):
        kept = output.keep[image] > 0.5
        weights = mask_logits[image, kept].softmax(dim=0)
        share = mask_logits[image].softmax(dim=0)[kept].sum(dim=0)
        expected = einsum(weights, output.pictures[image, kept], "k h w, k c h w -> c h w") * share / (share + 1e-5)
        assert distance(output.reconstruction[image], expected) <= 1e-10
        assert (output.masks[image, ~kept] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_what_a_dropped_slot_paints_has_no_effect_on_the_reconstruction(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, arguments = half_dropped(seed)
    before = model(*arguments)
    dropped = before.keep < 0.5

    decode = model.decoder.decode

    def repaint(slots: Tensor) -> tuple[Tensor, Tensor]:
        pictures, mask_logits = decode(slots)
        return pictures + 1e3 * dropped[:, :, None, None, None], mask_logits

    monkeypatch.setattr(model.decoder, "decode", repaint)
    after = model(*arguments)
    assert not torch.equal(after.pictures, before.pictures)
    assert torch.equal(after.reconstruction, before.reconstruction)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep_weight", [0.0, 0.3])
def test_the_gate_learns_from_the_slope_of_the_error_or_from_the_difference_a_decision_makes(
    seed: int, keep_weight: float
) -> None:
    found = {}
    for gate_gradient in ("slope", "difference"):
        model, (images, slot_noise, gate_noise) = half_dropped(seed, gate={"gradient": gate_gradient})
        output = model(images, slot_noise, gate_noise, temperature=0.7)
        bias = model.gate.logits.bias
        (found[gate_gradient],) = torch.autograd.grad(6 * loss_of(output, images, keep_weight), bias)

        # The straight-through gradient, with what stands for d error / d keep worked out apart.
        keep = model.gate(output.slots.detach(), gate_noise, 0.7).keep
        error = partial(error_of, images, *(part.detach() for part in model.decoder.decode(output.slots)))
        if gate_gradient == "slope":
            effect = torch.autograd.functional.jacobian(lambda kept, error=error: error(kept).sum(), keep.detach())
        else:
            columns = [[keep.detach().index_fill(1, torch.tensor(k), value) for value in (1, 0)] for k in range(5)]
            effect = torch.stack([error(kept) - error(dropped) for kept, dropped in columns], dim=1)
        (expected,) = torch.autograd.grad(((effect + keep_weight / 5) * keep).sum(), bias)
        assert distance(found[gate_gradient], expected) <= 1e-8
    assert distance(found["slope"], found["difference"]) > 0.01


def test_noise_reaches_the_slots_and_the_gate_and_the_gates_gradient_reaches_the_slots() -> None:
    model, (images, slot_noise, gate_noise) = half_dropped(0)
    output = model(images, slot_noise, gate_noise)
    slots = model.slot_attention(model.encoder(images), noise=slot_noise)
    decided = model.gate(slots, gate_noise)
    assert torch.equal(output.slots, slots) and torch.equal(output.keep, decided.keep)
    assert torch.equal(output.keep_probability, decided.probability)
    ways = [torch.autograd.grad(keep.sum(), model.encoder.mlp[2].weight)[0] for keep in (output.keep, decided.keep)]
    assert distance(*ways) <= 1e-10 and ways[1].abs().max() > 0


def test_the_temperature_reaches_the_gate_and_changes_no_value() -> None:
    model, arguments = half_dropped(0)
    found = []
    for temperature in (0.5, 1.0):
        output = model(*arguments, temperature=temperature)
        (gradient,) = torch.autograd.grad(output.keep.sum(), model.gate.logits.bias, retain_graph=True)
        found.append((output.reconstruction, gradient))
    assert torch.equal(found[0][0], found[1][0]) and distance(found[0][1], found[1][1]) > 0.01
