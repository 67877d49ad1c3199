"""Plots of a run: kept slots against objects, and curves."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from slot_models import SlotCounts


def confusion_figure(counts: SlotCounts) -> Figure:
    """Heat map of kept slots against objects; a gate that is always right draws a diagonal."""
    confusion = counts.confusion.numpy()
    figure = Figure(figsize=(4, 4), dpi=120)
    axis = figure.add_axes((0.13, 0.12, 0.84, 0.84))  # finding a layout would take as long as the drawing
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
