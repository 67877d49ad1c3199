"""TensorFlow's SAME convolution and its transpose, pixel by pixel from their definition, in NumPy."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def pads(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Output size and pixels padded before, as TensorFlow's documentation has them."""
    outputs = -(-size // stride)
    return outputs, max((outputs - 1) * stride + kernel - size, 0) // 2


def same_convolution(image: Array, kernel: Array, stride: int) -> Array:
    """image [C, H, W], kernel [O, C, k, k] -> [O, ceil(H / stride), ceil(W / stride)]; what is outside is zero."""
    size = kernel.shape[-1]
    height, top = pads(image.shape[1], size, stride)
    width, left = pads(image.shape[2], size, stride)
    output = np.zeros((kernel.shape[0], height, width))
    for y, x, dy, dx in np.ndindex(height, width, size, size):
        row, column = y * stride - top + dy, x * stride - left + dx
        if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
            output[:, y, x] += kernel[:, :, dy, dx] @ image[:, row, column]
    return output


def same_transposed(image: Array, kernel: Array, stride: int) -> Array:
    """The gradient of same_convolution: image [C, h, w], kernel [C, O, k, k] -> [O, h stride, w stride].

    Each pixel gives to the very pixels that the convolution would have gathered it from.
    """
    size = kernel.shape[-1]
    output = np.zeros((kernel.shape[1], image.shape[1] * stride, image.shape[2] * stride))
    _, top = pads(output.shape[1], size, stride)
    _, left = pads(output.shape[2], size, stride)
    for y, x, dy, dx in np.ndindex(*image.shape[1:], size, size):
        row, column = y * stride - top + dy, x * stride - left + dx
        if 0 <= row < output.shape[1] and 0 <= column < output.shape[2]:
            output[:, row, column] += kernel[:, :, dy, dx].T @ image[:, y, x]
    return output
