"""Set prediction: one row of properties for each slot (Locatello et al. 2020, section 4.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from slot_models.attention import MultiHeadSlotAttention, SlotAttention
from slot_models.checks import check_finite, check_positive, check_shape
from slot_models.encoders import ConvEncoder, glorot
from slot_models.matching import match
from slot_models.precision import at_least_float

# The columns of a row in the order of the published code: coordinates, one-hot factors, is_real.
COORDINATES = slice(0, 3)
FACTORS = {"size": slice(3, 5), "material": slice(5, 7), "shape": slice(7, 10), "colour": slice(10, 18)}
IS_REAL = 18
ROW_WIDTH = 19
COORDINATE_RANGE = 6.0  # scene coordinates lie in [-3, 3]


class SetClassifier(nn.Module):
    """What each slot holds: an MLP on every slot alone.

    Args:
        slot_dim: D, the width of a slot.
        hidden: width of the hidden layer.
        outputs: numbers a slot, each in 0..1; ROW_WIDTH for CLEVR.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, slot_dim: int = 64, hidden: int = 64, outputs: int = ROW_WIDTH) -> None:
        super().__init__()
        check_positive(slot_dim=slot_dim, hidden=hidden, outputs=outputs)
        self.slot_dim = slot_dim
        self.mlp = nn.Sequential(nn.Linear(slot_dim, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        glorot(self)

    def forward(self, slots: Tensor) -> Tensor:
        """slots [B, K, D] -> float32 at least [B, K, outputs]; half precision would tie confidences near 1."""
        check_shape("slots", slots, ("B", "K", self.slot_dim))
        return at_least_float(self.mlp(slots)).sigmoid()


class SetPredictor(nn.Module):
    """Encoder, slot attention and classifier.

    Args:
        encoder: images [B, 3, H, W] -> features [B, N, C].
        slot_attention: features to slots.
        classifier: slots [B, K, D] -> [B, K, 19].
    """

    def __init__(
        self, encoder: nn.Module, slot_attention: SlotAttention | MultiHeadSlotAttention, classifier: nn.Module
    ) -> None:
        super().__init__()
        slot_attention.checks_values = False  # forward names the images, and not what the encoder made of them
        self.encoder, self.slot_attention, self.classifier = encoder, slot_attention, classifier

    def forward(self, images: Tensor, slot_noise: Tensor | None = None) -> Tensor:
        """Predicts a set.

        Args:
            images: float [B, 3, H, W] in [-1, 1].
            slot_noise: standard normal [B, K, D]; a fixed draw where it is not given.

        Returns:
            float [B, K, 19], see clevr_targets for the columns; the last is the confidence that a slot holds an object.

        Raises:
            ValueError: a shape does not fit, or an argument holds NaN or infinity.
        """
        slots = self.slot_attention(self.encoder(images), noise=slot_noise)  # [B, K, D]
        predictions: Tensor = self.classifier(slots)  # [B, K, 19]
        check_finite(predictions, images=images, slot_noise=slot_noise)
        return predictions


def build_set_predictor(
    image_size: int = 128,
    num_slots: int = 10,
    *,
    slot_dim: int = 64,
    iterations: int = 3,
    hidden_dim: int = 128,
    encoder_channels: int = 64,
    encoder_kernel: int = 5,
    encoder_strides: Sequence[int] = (1, 2, 2, 1),
    classifier_hidden: int = 64,
) -> SetPredictor:
    """Puts a set predictor together from plain numbers; the defaults are the published CLEVR10 model.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    encoder = ConvEncoder(image_size, encoder_channels, encoder_kernel, encoder_strides)
    attention = SlotAttention(num_slots, slot_dim, iterations, hidden_dim=hidden_dim, input_dim=encoder.dim)
    return SetPredictor(encoder, attention, SetClassifier(slot_dim, classifier_hidden))


def clevr_targets(
    coordinates: Tensor,
    size: Tensor,
    material: Tensor,
    shape: Tensor,
    colour: Tensor,
    real: Tensor | None = None,
    *,
    rows: int = 10,
) -> Tensor:
    """What set_loss and average_precision compare predictions with.

    The columns are those of the published code (its ``data.py``): 0-2 coordinates, from [-3, 3] to [0, 1]; 3-4 size,
    5-6 material, 7-9 shape, 10-17 colour, each one-hot; 18 is_real.

    Args:
        coordinates: float [B, N, 3], x, y and z in the scene.
        size, material, shape, colour: int [B, N], classes from 0. A data set that keeps 0 for "none" has to take 1 off.
        real: bool [B, N], the entries that are objects (not the background, not absent); all by default. The others may
            hold anything.
        rows: K, rows of a set.

    Returns:
        float [B, rows, 19], float32 unless the coordinates are float64: the objects of an image in their order, then
        zero rows.

    Raises:
        ValueError: a shape does not fit, a factor of an object is out of its range, a coordinate of one is not finite,
            or an image has more objects than rows.
    """
    check_positive(rows=rows)
    check_shape("coordinates", coordinates, ("B", "N", 3))
    batch, entries, _ = coordinates.shape
    if real is None:
        real = torch.ones(batch, entries, dtype=torch.bool, device=coordinates.device)
    check_shape("real", real, (batch, entries))
    if real.dtype != torch.bool:
        raise ValueError(f"real: dtype {real.dtype} is not torch.bool; compare, as in visibility > 0")
    most = int(real.sum(dim=1).max()) if batch else 0
    if most > rows:
        raise ValueError(f"real: an image has {most} objects, more than rows: {rows}; raise rows or leave it out")
    coordinates = torch.where(real[..., None], at_least_float(coordinates), 0)
    if not bool(coordinates.isfinite().all()):
        raise ValueError("coordinates: those of an object are NaN or infinite")

    columns = [coordinates / COORDINATE_RANGE + 0.5]  # (x + 3) / 6
    for (name, place), labels in zip(FACTORS.items(), (size, material, shape, colour), strict=True):
        columns.append(_one_hot(name, labels, real, place.stop - place.start).to(coordinates))
    columns.append(torch.ones_like(coordinates[..., :1]))
    targets = torch.cat(columns, dim=-1) * real[..., None]  # [B, N, 19]

    objects_first = torch.argsort((~real).long(), dim=1, stable=True)  # [B, N]
    targets = targets.gather(1, objects_first[..., None].expand_as(targets))[:, :rows]
    return functional.pad(targets, (0, 0, 0, rows - targets.shape[1]))


def set_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Huber error (delta 1) of the best one-to-one matching of two sets (Zhang et al. 2019, Deep Set Prediction
    Networks, equation 2; Locatello et al. 2020).

    The cost of a pair is the mean over its numbers; an image's loss is the sum over the matched pairs. The matching is
    found in float64 and has no gradient: the gradient goes through the costs of the matched pairs alone.

    Args:
        predictions: float [B, K, P].
        targets: float [B, K, P], padded with zero rows to the number of predictions.

    Returns:
        float [B], float32 at least.

    Raises:
        ImportError: scipy is missing.
        ValueError: a shape does not fit, there are no slots, or a number is NaN or infinite.
    """
    check_shape("predictions", predictions, ("B", "K", "P"))
    if predictions.shape[1] == 0 or predictions.shape[2] == 0:
        raise ValueError(f"predictions: shape {tuple(predictions.shape)} has no slots or no numbers")
    check_shape("targets", targets, tuple(predictions.shape))
    predictions = at_least_float(predictions)
    targets = targets.to(predictions)
    with torch.no_grad():
        slots = predictions.shape[1]
        predicted = predictions.double()[:, :, None].expand(-1, -1, slots, -1)  # [B, K, K, P]
        wanted = targets.double()[:, None].expand(-1, slots, -1, -1)  # [B, K, K, P]
        cost = functional.huber_loss(predicted, wanted, reduction="none").mean(dim=3).cpu()  # [B, K, K]
        if not bool(cost.isfinite().all()):
            name = "targets" if bool(predictions.isfinite().all()) else "predictions"
            raise ValueError(f"{name}: it holds NaN or infinity")
        matched = match(cost)[1].to(targets.device)  # [B, K], the target of each prediction
    targets = targets.gather(1, matched[..., None].expand_as(targets))  # [B, K, P]
    return functional.huber_loss(predictions, targets, reduction="none").mean(dim=2).sum(dim=1)


def _one_hot(name: str, labels: Tensor, real: Tensor, classes: int) -> Tensor:
    """int64 [B, N, classes]; class 0 where the entry is no object."""
    check_shape(name, labels, tuple(real.shape))
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name}: dtype {labels.dtype} is not an integer one")
    labels = torch.where(real, labels.long(), 0)
    outside = labels[(labels < 0) | (labels >= classes)]
    if outside.numel():
        raise ValueError(f"{name}: {int(outside[0])} is not in 0..{classes - 1}; classes begin at 0")
    return functional.one_hot(labels, classes)
