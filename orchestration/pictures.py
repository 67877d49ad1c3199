"""Pictures that explain a model: scenes with their slots, and counts."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from slot_models import SlotCounts, SlotOutput

CELL = 1.1  # inches


def scene_figure(images: NDArray[np.uint8], output: SlotOutput) -> Figure:
    """A row for each image: input, reconstruction, masks, and each slot's picture with kept slots framed.

    Where features are reconstructed there is nothing to draw: the reconstruction is left out, and a slot shows its part
    of the image.

    Args:
        images: uint8 [N, H, W, 3].
        output: of these images, on the CPU.
    """
    count, slots = output.keep.shape
    drawn = output.pictures is not None and output.target.shape[1:] == (3, *images.shape[1:3])
    titles = ["input", "drawn back", "masks"] if drawn else ["input", "masks"]
    columns = len(titles) + slots
    figure = Figure(figsize=(columns * CELL, count * CELL + 0.3), layout="constrained", dpi=150)
    axes = figure.subplots(count, columns, squeeze=False)
    masks = output.masks_at(*images.shape[1:3]).numpy()  # [N, K, H, W]
    if drawn:
        assert output.pictures is not None
        pictures, reconstructions = _pixels(output.pictures), _pixels(output.reconstruction)  # [N, K, H, W, 3]
    else:
        pictures = np.repeat(images[:, None] / np.float32(255), slots, axis=1)
    for row, image in enumerate(images):
        shown = [image, *([reconstructions[row]] if drawn else []), overlay(image, masks[row])]
        # a slot's share of the scene: its picture where its mask is, white elsewhere
        shown += [pictures[row, k] * masks[row, k, ..., None] + 1 - masks[row, k, ..., None] for k in range(slots)]
        for column, (axis, picture) in enumerate(zip(axes[row], shown, strict=True)):
            axis.imshow(picture, interpolation="nearest", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            slot = column - len(titles)
            if slot >= 0:
                _mark(axis, kept=bool(output.keep[row, slot] > 0.5), slot=slot)
    for axis, title in zip(axes[0], [*titles, *(f"slot {k}" for k in range(slots))], strict=True):
        axis.set_title(title, fontsize=8)
    return figure


def overlay(image: NDArray[np.uint8], masks: NDArray[np.float32]) -> NDArray[np.float64]:
    """The image, greyed, under each slot's colour. image [H, W, 3], masks [K, H, W] -> [H, W, 3] in 0..1."""
    painted = np.einsum("khw,kc->hwc", masks, slot_colours(len(masks)))
    grey = image.mean(axis=2, keepdims=True) / 255
    mixed: NDArray[np.float64] = np.clip(0.25 * grey + 0.75 * painted, 0, 1)
    return mixed


def slot_colours(slots: int) -> NDArray[np.float64]:
    """Of each slot, [K, 3] in 0..1; they repeat after ten."""
    colours: NDArray[np.float64] = mpl.colormaps["tab10"](np.arange(slots) % 10)[:, :3]
    return colours


def attention_figure(images: NDArray[np.uint8], attention: Tensor) -> Figure:
    """A row for each image: what each slot won of it, in its colour, iteration by iteration.

    Args:
        images: uint8 [N, H, W, 3].
        attention: float [N, T, K, h, w], on the CPU; see SlotOutput.
    """
    count, iterations, slots = attention.shape[:3]
    figure = Figure(figsize=((1 + iterations) * CELL, count * CELL + 0.3), layout="constrained", dpi=150)
    axes = figure.subplots(count, 1 + iterations, squeeze=False)
    shares = functional.interpolate(attention.flatten(1, 2), images.shape[1:3], mode="nearest")
    painted = shares.numpy().reshape(count, iterations, slots, *images.shape[1:3])
    for row, image in enumerate(images):
        shown = [image, *(overlay(image, painted[row, iteration]) for iteration in range(iterations))]
        for axis, picture in zip(axes[row], shown, strict=True):
            axis.imshow(picture, interpolation="nearest", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], ["input", *(f"iteration {t + 1}" for t in range(iterations))], strict=True):
        axis.set_title(title, fontsize=8)
    return figure


def confusion_figure(counts: SlotCounts) -> Figure:
    """Heat map of kept slots against objects; a gate that is always right draws a diagonal."""
    confusion = counts.confusion.numpy()
    figure = Figure(figsize=(4, 4), layout="constrained", dpi=150)
    axis = figure.subplots()
    axis.imshow(confusion, origin="lower", cmap="Blues")
    for (kept, objects), number in np.ndenumerate(confusion):
        if number:
            colour = "white" if number > confusion.max() / 2 else "black"
            axis.text(objects, kept, f"{number:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set(
        xlabel="objects in the scene",
        ylabel="kept slots",
        xticks=range(confusion.shape[1]),
        yticks=range(confusion.shape[0]),
    )
    return figure


def curves_figure(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Curves over steps, one above the other: name -> (step, value) points."""
    figure = Figure(figsize=(7, 1.6 * len(curves)), layout="constrained", dpi=120)
    axes = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_ylabel(name, fontsize=7)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    return figure


def _mark(axis: "mpl.axes.Axes", kept: bool, slot: int) -> None:
    colour = mpl.colormaps["tab10"](slot % 10) if kept else "lightgrey"
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=3 if kept else 0.5)
    if not kept:
        axis.set_xlabel("dropped", fontsize=6, color="grey", labelpad=1)


def _pixels(images: Tensor) -> NDArray[np.float32]:
    """[..., 3, H, W] in [-1, 1] -> [..., H, W, 3] in 0..1."""
    pixels: NDArray[np.float32] = np.moveaxis(((images.clamp(-1, 1) + 1) / 2).numpy(), -3, -1)
    return pixels
