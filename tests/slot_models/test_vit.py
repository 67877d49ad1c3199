"""The backbone against timm's own readings of the same model. Weights are random: no test fetches any."""

import builtins
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from slot_oracles import distance
from torch import Tensor

from slot_models.adaptive import SlotGate
from slot_models.attention import SlotAttention
from slot_models.autoencoder import SlotAutoencoder
from slot_models.encoders import FeatureEncoder
from slot_models.patch_decoders import MLPPatchDecoder
from slot_models.transformer_decoder import TransformerDecoder
from slot_models.vit import ViTBackbone

TINY = "vit_tiny_patch16_224"  # images normalised by mean and deviation 0.5
DINO = "vit_small_patch16_224.dino"  # by ImageNet's
POOLED = ["vit_base_patch16_siglip_224", "vit_wee_patch16_reg1_gap_256"]  # by attention, and by a mean and its norm
REGISTERS = "vit_small_patch14_reg4_dinov2"  # a class token and four registers
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    """timm, also beside PyPI's torchvision and a CPU build of torch.

    That torchvision is compiled for CUDA; without it its operators are not registered, and the import fails on two of
    them. A vision transformer uses none, so declaring them is enough.
    """
    library = None
    try:
        import timm
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")  # its declarations end with it
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm
    yield timm
    del library


@pytest.fixture
def few_blocks(timm: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Two blocks instead of twelve; and what timm was asked for."""
    asked: list[dict[str, Any]] = []
    create = timm.create_model

    def smaller(name: str, **options: Any) -> Any:
        asked.append({"name": name} | options)
        return create(name, **options | {"pretrained": False, "depth": 2})

    monkeypatch.setattr(timm, "create_model", smaller)
    torch.manual_seed(0)
    return asked


def images(batch: int, height: int, width: int, seed: int = 1) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize(
    ("name", "size", "statistics"),
    [(TINY, 32, ([0.5] * 3, [0.5] * 3)), (DINO, (32, 48), IMAGENET), (REGISTERS, 28, IMAGENET)],
)
def test_features_are_the_patches_of_the_last_block(
    few_blocks: Any, name: str, size: Any, statistics: tuple[list[float], list[float]], final_norm: bool
) -> None:
    backbone = ViTBackbone(name, image_size=size, final_norm=final_norm)
    height, width = backbone.image_size
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    pixels = images(2, height, width)
    features = backbone(pixels)
    patch = 14 if name == REGISTERS else 16
    assert backbone.grid == (height // patch, width // patch)
    assert features.shape == (2, backbone.grid[0] * backbone.grid[1], backbone.dim)

    mean, deviation = (torch.tensor(values)[:, None, None] for values in statistics)
    normalised = ((pixels + 1) / 2 - mean) / deviation
    with torch.no_grad():
        (expected,) = backbone.model.get_intermediate_layers(normalised, n=1, norm=final_norm)
    assert distance(features, expected) <= 1e-5


def test_patches_come_in_row_order(few_blocks: Any) -> None:
    """Without attention between them, a change of one patch's pixels changes its own feature alone."""
    backbone = ViTBackbone(TINY, image_size=(32, 48))
    with torch.no_grad():
        for block in backbone.model.blocks:
            block.attn.proj.weight.zero_()
        pixels = images(1, 32, 48)
        before = backbone(pixels)
        pixels[:, :, 16:, 32:] *= -1  # second row, third column
        changed = (backbone(pixels) - before).abs().amax(dim=(0, 2)) > 1e-4
    assert changed.tolist() == [False] * 5 + [True]


def test_a_frozen_backbone_never_trains(few_blocks: Any) -> None:
    backbone = ViTBackbone(TINY, image_size=32)
    parent = torch.nn.Sequential(backbone).train()
    assert parent.training and not any(module.training for module in backbone.modules())
    features = backbone(images(2, 32, 32).requires_grad_())
    assert not features.requires_grad and not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("name", [TINY, *POOLED])
def test_a_backbone_that_is_not_frozen_trains_whole(few_blocks: Any, name: str) -> None:
    backbone = ViTBackbone(name, image_size=32, frozen=False)
    assert all(module.training for module in backbone.train().modules())
    assert not any(module.training for module in backbone.eval().modules())
    backbone(images(2, 32, 32)).square().sum().backward()
    for name, parameter in backbone.named_parameters():
        if not name.endswith("attn.qkv.bias"):  # its part for the keys has no effect
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_weights_are_fetched_only_when_asked_for(few_blocks: list[dict[str, Any]]) -> None:
    ViTBackbone(TINY, image_size=32)
    ViTBackbone(TINY, image_size=32, pretrained=True)
    assert [asked["pretrained"] for asked in few_blocks] == [False, True]


def test_statistics_are_no_weights(few_blocks: Any) -> None:
    backbone = ViTBackbone(TINY, image_size=32)
    assert not {"mean", "std"} & set(backbone.state_dict()) and {"mean", "std"} <= dict(backbone.named_buffers()).keys()


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_a_model_of_its_features_learns_and_leaves_it_alone(few_blocks: Any, kind: str) -> None:
    backbone = ViTBackbone(TINY, image_size=32)
    sizes = (16, backbone.dim, backbone.grid)
    decoder = MLPPatchDecoder(*sizes, 32) if kind == "mlp" else TransformerDecoder(*sizes, 32, 1, 2)
    attention = SlotAttention(3, 16, hidden_dim=16, input_dim=12)
    model = SlotAutoencoder(
        FeatureEncoder(backbone.dim, 12), attention, SlotGate(16), decoder, backbone=backbone
    ).train()
    frozen = [parameter.clone() for parameter in backbone.parameters()]
    optimiser = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=3e-3)
    pixels, losses = images(2, 32, 32), []
    for _ in range(10):
        output = model(pixels, stage="open")
        loss = (output.reconstruction - output.target).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0], losses
    assert torch.equal(output.target.flatten(2).transpose(1, 2), backbone(pixels))
    assert all(torch.equal(now, then) for now, then in zip(backbone.parameters(), frozen, strict=True))


def test_a_backbone_is_exported_for_any_batch_and_runs_in_bf16(few_blocks: Any) -> None:
    backbone = ViTBackbone(TINY, image_size=32)
    exported = torch.export.export(
        backbone, (images(2, 32, 32),), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
    ).module()
    more = images(5, 32, 32, seed=3)
    assert distance(exported(more), backbone(more)) <= 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone(more)
    assert rounded.isfinite().all() and distance(rounded.float(), backbone(more)) <= 2e-2


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("name: timm has no model 'vit_of_nobody'", {"name": "vit_of_nobody"}),
        ("name: 'resnet18' is not a vision transformer", {"name": "resnet18"}),
        ("image_size: 40 is not a multiple of the patch's 16 pixels", {"image_size": 40}),
        ("image_size: 0 is not positive", {"image_size": (0, 32)}),
    ],
)
def test_what_does_not_fit_is_named(timm: Any, message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ViTBackbone(**{"name": TINY} | options)


def test_images_of_another_shape_are_named(few_blocks: Any) -> None:
    with pytest.raises(ValueError, match=r"^images: shape \(2, 3, 32, 48\) is not \[B, 3, 32, 32\]"):
        ViTBackbone(TINY, image_size=32)(images(2, 32, 48))


@pytest.mark.parametrize(
    ("failure", "cure"),
    [
        (ModuleNotFoundError("No module named 'timm'"), r'timm .*named .timm.*pip install "slotforge\[models\]"'),
        (RuntimeError("operator torchvision::nms does not exist"), "install torchvision from the index"),
    ],
    ids=["missing", "broken"],
)
def test_without_timm_the_cure_is_named(failure: Exception, cure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def refuse(name: str, *others: Any, **options: Any) -> Any:
        if name == "timm":
            raise failure
        return found(name, *others, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=cure) as raised:
        ViTBackbone(TINY)
    assert raised.value.__cause__ is failure
