"""Pictures that explain a model: sheets of scenes with their slots, and of the attention by iteration.

Sheets are pasted together by Pillow: while a run trains they are made at each evaluation, and a plotting library takes
a second for what this does in hundredths of one.
"""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from slot_models import SlotOutput

Pixels = NDArray[np.floating]

SIDE = 160  # pixels of a cell, about: small images are enlarged by a whole number, large ones are shrunk to it
GAP, FRAME, HEAD = 8, 5, 24
PAPER, INK = (255, 255, 255), (90, 90, 90)


def scene_sheet(images: NDArray[np.uint8], output: SlotOutput) -> Image.Image:
    """A row for each image: input, reconstruction, masks, and what each slot draws; kept slots have a frame.

    Where features are reconstructed there is nothing to draw: the reconstruction is left out, and a slot shows its part
    of the image.

    Args:
        images: uint8 [N, H, W, 3].
        output: of these images, on the CPU.
    """
    slots = output.keep.shape[1]
    drawn = output.pictures is not None and output.target.shape[1:] == (3, *images.shape[1:3])
    titles = ["input", *(["drawn back"] if drawn else []), "masks", *(f"slot {k}" for k in range(slots))]
    masks = output.masks_at(*images.shape[1:3]).numpy()  # [N, K, H, W]
    if drawn:
        assert output.pictures is not None
        pictures, reconstructions = _pixels(output.pictures), _pixels(output.reconstruction)  # [N, K, H, W, 3]
    else:
        pictures = np.repeat(images[:, None] / np.float32(255), slots, axis=1)
    shares = masks[..., None]  # [N, K, H, W, 1]
    taken = pictures * shares + 1 - shares  # a slot's picture where its mask is, white elsewhere
    rows = []
    for row, image in enumerate(images):
        cells = [_cell(image / 255)]
        if drawn:
            cells.append(_cell(reconstructions[row]))
        cells.append(_cell(overlay(image, masks[row])))
        for slot, keep in enumerate((output.keep[row] > 0.5).tolist()):
            cells.append(_framed(_cell(taken[row, slot]), slot) if keep else _dropped(_cell(taken[row, slot])))
        rows.append(cells)
    return _sheet(titles, rows)


def attention_sheet(images: NDArray[np.uint8], attention: Tensor) -> Image.Image:
    """A row for each image: what each slot won of it, in its colour, iteration by iteration.

    Args:
        images: uint8 [N, H, W, 3].
        attention: float [N, T, K, h, w], on the CPU; see SlotOutput.
    """
    iterations, slots = attention.shape[1:3]
    large = functional.interpolate(attention.flatten(1, 2), images.shape[1:3], mode="nearest")
    won = large.numpy().reshape(len(images), iterations, slots, *images.shape[1:3])
    rows = [
        [_cell(image / 255), *(_cell(overlay(image, won[row, iteration])) for iteration in range(iterations))]
        for row, image in enumerate(images)
    ]
    return _sheet(["input", *(f"iteration {t + 1}" for t in range(iterations))], rows)


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


def _sheet(titles: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Cells of one size, in rows under titles."""
    width, height = (side + GAP for side in rows[0][0].size)
    sheet = Image.new("RGB", (GAP + width * len(titles), HEAD + height * len(rows)), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, title in enumerate(titles):
        pen.text((GAP + column * width + width // 2 - GAP // 2, HEAD // 2), title, INK, font, anchor="mm")
        for row, cells in enumerate(rows):
            sheet.paste(cells[column], (GAP + column * width, HEAD + row * height))
    return sheet


def _cell(picture: Pixels) -> Image.Image:
    """[H, W, 3] in 0..1."""
    cell = Image.fromarray(np.rint(picture * 255).astype(np.uint8))
    times = SIDE // max(cell.size)
    if times > 0:
        return cell.resize((cell.width * times, cell.height * times), Image.Resampling.NEAREST)
    cell.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    return cell


def _framed(cell: Image.Image, slot: int) -> Image.Image:
    colour = tuple(np.rint(slot_colours(slot + 1)[slot] * 255).astype(int).tolist())
    ImageDraw.Draw(cell).rectangle((0, 0, cell.width - 1, cell.height - 1), outline=colour, width=FRAME)
    return cell


def _dropped(cell: Image.Image) -> Image.Image:
    faded = Image.blend(cell, Image.new("RGB", cell.size, (225, 225, 225)), 0.8)
    middle = (cell.width // 2, cell.height // 2)
    ImageDraw.Draw(faded).text(middle, "dropped", INK, ImageFont.load_default(13), anchor="mm")
    return faded


def _pixels(images: Tensor) -> NDArray[np.float32]:
    """[..., 3, H, W] in [-1, 1] -> [..., H, W, 3] in 0..1."""
    pixels: NDArray[np.float32] = np.moveaxis(((images.clamp(-1, 1) + 1) / 2).numpy(), -3, -1)
    return pixels
