"""With a backbone, its features are encoded and reconstructed."""

from typing import Any

import pytest
import torch
from autoencoders import (
    FEATURE_DECODERS,
    error_of,
    loss_of,
    of_features,
    scene,
)
from slot_oracles import distance
from torch.nn import functional

from slot_models.decoders import Decoded


@pytest.mark.parametrize("kind", FEATURE_DECODERS)
def test_with_a_backbone_its_features_are_encoded_and_reconstructed(kind: str) -> None:
    model, (images, slot_noise, gate_noise) = of_features(kind), scene(3)
    output = model(images, slot_noise, gate_noise)
    features = functional.conv2d(images, model.backbone.embed.weight, model.backbone.embed.bias, stride=3)
    assert torch.equal(output.target, features) and not output.target.requires_grad
    assert output.reconstruction.shape == (3, 6, 3, 4) and output.masks.shape == (3, 4, 3, 4)
    assert (output.pictures is None) == (kind == "transformer")

    inputs = model.encoder(features.flatten(2).transpose(1, 2))
    slots = model.slot_attention(inputs, noise=slot_noise)
    keep = model.gate(slots, gate_noise).keep
    assert 0 < keep.mean() < 1
    decoded: Decoded = model.decoder(slots, keep, features)
    assert torch.equal(output.slots, slots) and torch.equal(output.keep, keep)
    assert torch.equal(output.reconstruction, decoded.reconstruction) and torch.equal(output.masks, decoded.masks)


@pytest.mark.parametrize("kind", FEATURE_DECODERS)
@pytest.mark.parametrize("gate_gradient", ["slope", "difference"])
def test_every_parameter_but_the_backbones_learns_from_features(kind: str, gate_gradient: Any) -> None:
    if (kind, gate_gradient) == ("transformer", "difference"):
        with pytest.raises(ValueError, match=r"^gate_gradient: 'difference' needs .* TransformerDecoder draws none"):
            of_features(kind, gate_gradient=gate_gradient)
        return
    model, arguments = of_features(kind, gate_gradient=gate_gradient), scene(3)
    loss_of(model(*arguments), arguments[0], 0.1).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            assert parameter.grad is None, name
        elif name != "slot_attention.norm_slots.bias":  # shared by all slots, so their softmax does not see it
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_difference_of_a_decision_is_measured_in_the_features() -> None:
    model, (images, slot_noise, gate_noise) = of_features("mlp", gate_gradient="difference"), scene(3)
    output = model(images, slot_noise, gate_noise)
    (found,) = torch.autograd.grad(output.auxiliary.sum(), model.gate.logits.bias)
    pictures, mask_logits = (part.detach() for part in model.decoder.decode(output.slots))
    keep = model.gate(output.slots.detach(), gate_noise).keep
    columns = [[keep.detach().index_fill(1, torch.tensor(k), value) for value in (1, 0)] for k in range(4)]
    effect = torch.stack(
        [
            error_of(output.target, pictures, mask_logits, kept)
            - error_of(output.target, pictures, mask_logits, dropped)
            for kept, dropped in columns
        ],
        dim=1,
    )
    (expected,) = torch.autograd.grad((effect * keep).sum(), model.gate.logits.bias)
    assert distance(found, expected) <= 1e-8 and expected.abs().max() > 0


def test_masks_of_patches_are_resized_to_the_image() -> None:
    model, arguments = of_features("mlp"), scene(2)
    with torch.no_grad():
        output = model(*arguments)
    assert output.masks_at(3, 4) is output.masks
    large = output.masks_at(9, 12)
    assert large.shape == (2, 4, 9, 12) and distance(large.sum(dim=1), torch.ones(2, 9, 12)) <= 1e-4
    # the centre pixel of a patch has the patch's value; half way between two centres would be their mean
    assert distance(large[:, :, 1::3, 1::3], output.masks) <= 1e-12
    thirds = (2 * output.masks[..., :-1] + output.masks[..., 1:]) / 3
    assert distance(large[:, :, 1::3, 2:-1:3], thirds) <= 1e-12
