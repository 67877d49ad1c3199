"""Autoencoders of every kind, and images for them."""

from pathlib import Path
from typing import Any

import torch
import yaml
from einops import einsum
from torch import Tensor, nn

from slot_models.adaptive import SlotGate
from slot_models.attention import SlotAttention
from slot_models.autoencoder import SlotAutoencoder, SlotOutput
from slot_models.build import build_autoencoder
from slot_models.encoders import FeatureEncoder
from slot_models.patch_decoders import MLPPatchDecoder
from slot_models.transformer_decoder import TransformerDecoder

DEMO = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "demo.yaml").read_text())["model"]
for part, kind in (("encoder", "conv"), ("attention", "slots"), ("decoder", "broadcast")):
    DEMO[part]["kind"] = kind


SMALL = {
    "image_size": 9,
    "num_slots": 5,
    "slot_dim": 8,
    "encoder": {"kind": "conv", "strides": (3, 1), "padding": "centred"},
    "attention": {"kind": "slots", "hidden_dim": 8},
    "gate": {},
}


def build(sizes: dict[str, Any], seed: int = 0) -> SlotAutoencoder:
    torch.manual_seed(seed)
    return build_autoencoder(**sizes)


def blocks(count: int, size: int) -> Tensor:
    """Images with two coloured blocks on grey, in [-1, 1]: float32 [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(1)
    images = torch.full((count, 3, size, size), -0.5)
    for image in images:
        for _ in range(2):
            top, left = torch.randint(0, size - size // 3, (2,), generator=generator).tolist()
            colour = torch.randint(0, 2, (3, 1, 1), generator=generator) * 2.0 - 1
            image[:, top : top + size // 3, left : left + size // 3] = colour
    return images


def noises(sizes: dict[str, Any], batch: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randn(batch, sizes["num_slots"], sizes.get("slot_dim", 64), generator=generator)
    uniform = torch.rand(batch, sizes["num_slots"], 2, generator=generator).clamp(1e-6, 1 - 1e-6)
    return slots, -(-uniform.log()).log()


def parts(output: SlotOutput) -> list[Tensor]:
    """What it says of each image."""
    return [part for part in output._replace(code_tally=None) if part is not None]


def loss_of(output: SlotOutput, images: Tensor, keep_weight: float) -> Tensor:
    assert images.shape[2:] != output.target.shape[2:] or output.target is images
    error = (output.reconstruction - output.target).square().mean()
    return error + keep_weight * output.keep.mean() + output.auxiliary.mean()


def error_of(images: Tensor, pictures: Tensor, mask_logits: Tensor, keep: Tensor) -> Tensor:
    """Of the paper's mixture: mean squared error over an image's values. [B]"""
    alpha = mask_logits.softmax(dim=1) * keep[:, :, None, None]
    mixed = einsum(alpha, pictures, "b k h w, b k c h w -> b c h w") / (alpha.sum(dim=1)[:, None] + 1e-5)
    return (mixed - images).square().mean(dim=(1, 2, 3))


class Patches(nn.Module):
    """Stands for a vision transformer: each 3 x 3 pixels of an image of 9 x 12 to six features."""

    dim, grid = 6, (3, 4)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, self.dim, 3, 3).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(images).flatten(2).transpose(1, 2)  # [B, N, F]


FEATURE_DECODERS = {
    "mlp": lambda: MLPPatchDecoder(8, 6, Patches.grid, 16),
    "transformer": lambda: TransformerDecoder(8, 6, Patches.grid, 32, 1, 2),
}


def of_features(kind: str, iters: int = 3, **options: Any) -> SlotAutoencoder:
    torch.manual_seed(0)
    attention = SlotAttention(4, 8, iters, hidden_dim=8, input_dim=10)
    decoder = FEATURE_DECODERS[kind]()
    model = SlotAutoencoder(FeatureEncoder(6, 10), attention, SlotGate(8), decoder, backbone=Patches(), **options)
    return model.double()


def scene(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    slot_noise, gate_noise = noises({"num_slots": 4, "slot_dim": 8}, batch)
    images = torch.randn(batch, 3, 9, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return images, slot_noise.double(), gate_noise.double()
