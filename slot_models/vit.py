"""A vision transformer from timm, whose features slots are to explain."""

from typing import Any

import torch
from torch import Tensor, nn

from slot_models.checks import check_positive, check_shape
from slot_models.positions import Size, height_width


class ViTBackbone(nn.Module):
    """Patch features of a vision transformer (DINOSAUR, Seitzer et al. 2023).

    Frozen it stays in evaluation mode, its parameters take no gradient, and it runs without a graph.

    Args:
        name: of a vision transformer in timm.
        pretrained: whether to fetch its published weights, from timm's hub; random ones otherwise.
        frozen: whether it is not trained.
        image_size: pixels a side, or (height, width); multiples of the patch.
        final_norm: whether the last LayerNorm is applied. DINOSAUR takes the last block's output without it.

    Raises:
        ImportError: timm is not installed, or does not load.
        ValueError: timm has no such model, it is not a vision transformer, or the image size does not fit it.
    """

    def __init__(
        self,
        name: str = "vit_base_patch16_224.dino",
        pretrained: bool = False,
        frozen: bool = True,
        image_size: Size = 224,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        self.image_size = height_width(image_size)
        check_positive(image_size=min(self.image_size))
        model = _create(name, pretrained, self.image_size)
        # What is not used leaves: its parameters would get no gradient, and ZeRO-3 would repeat their last one.
        for part in ("attn_pool", "fc_norm", *([] if final_norm else ["norm"])):
            if isinstance(getattr(model, part, None), nn.Module):
                setattr(model, part, nn.Identity())
        self.model: Any = model
        self.frozen = frozen
        self.dim: int = model.num_features
        self.grid: tuple[int, int] = model.patch_embed.grid_size
        self.mean: Tensor
        self.std: Tensor
        for key in ("mean", "std"):  # of the images that it was trained on, in 0..1
            value = torch.tensor(model.pretrained_cfg[key], dtype=torch.float32)[:, None, None]
            self.register_buffer(key, value, persistent=False)
        if frozen:
            self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "ViTBackbone":
        """As a module's, but that a frozen model stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> features [B, N, F], N patches in row order; no class or register token.

        Raises:
            ValueError: the images have another shape.
        """
        check_shape("images", images, ("B", 3, *self.image_size))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens: Tensor = self.model.forward_features(((images + 1) / 2 - self.mean) / self.std)
            return tokens[:, self.model.num_prefix_tokens :]


def _create(name: str, pretrained: bool, image_size: tuple[int, int]) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f'a vision transformer needs timm ({error}); pip install "slotforge[models]"') from error
    except RuntimeError as error:  # torchvision's operators are compiled for one build of torch
        raise ImportError(
            f"a vision transformer needs timm, which does not load ({error}); install torchvision from the index that "
            "torch is from"
        ) from error
    if not timm.is_model(name):
        raise ValueError(f"name: timm has no model {name!r}; timm.list_models('vit_*') lists its vision transformers")
    try:
        model: Any = timm.create_model(name, pretrained=pretrained, img_size=image_size, num_classes=0)
    except TypeError as error:
        raise ValueError(f"name: {name!r} is not a vision transformer of timm ({error})") from error
    if not hasattr(model, "num_prefix_tokens") or not hasattr(model, "patch_embed"):
        raise ValueError(f"name: {name!r} is not a vision transformer of timm; take a vit_* model")
    for size, patch in zip(image_size, model.patch_embed.patch_size, strict=True):
        if size % patch:
            raise ValueError(f"image_size: {size} is not a multiple of the patch's {patch} pixels")
    return model
