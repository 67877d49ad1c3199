"""Convolutions with TensorFlow's SAME padding, which the published models have.

A stride s takes n pixels to n / s, and a transposed convolution n to n s. What has to be padded, kernel - s pixels, is
split in halves, and the odd one goes to the end; torch's own ``padding`` pads both sides alike.
"""

from torch import Tensor, nn
from torch.nn import functional


def same_padding(kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and after, for a size that the stride divides."""
    total = max(kernel - stride, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """[B, C, H, W] -> [B, outputs, H / stride, W / stride]; the stride divides both sides."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        before, after = same_padding(kernel, stride)
        super().__init__(inputs, outputs, kernel, stride, padding=before)
        self.beyond = after - before  # 0 or 1

    def forward(self, inputs: Tensor) -> Tensor:
        if self.beyond:
            inputs = functional.pad(inputs, (0, self.beyond, 0, self.beyond))
        return super().forward(inputs)


class TurnedConvTranspose2d(nn.ConvTranspose2d):
    """The adjoint of SameConv2d on images turned by 180 degrees: [B, C, H, W] -> [B, outputs, H stride, W stride].

    Turned, the odd pixel is at the other end, where torch's ``output_padding`` has it; upright, a row and a column too
    many would have to be cut off, which copies the result. The weight is that of upright images. With a stride of 1
    this is a plain convolution, and computed as one: faster, and nearer in half precision.

    Raises:
        ValueError: the kernel is smaller than the stride, which would leave pixels without any input; or even with a
            stride of 1, which has no middle.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        if kernel < stride:
            raise ValueError(f"kernel: {kernel} is less than the stride {stride}; take a larger one")
        if stride == 1 and kernel % 2 == 0:
            raise ValueError(f"kernel: {kernel} is even; without a stride take an odd one")
        before, after = same_padding(kernel, stride)
        super().__init__(inputs, outputs, kernel, stride, padding=after, output_padding=after - before)
        self.before = after  # what is dropped at the start of the turned image

    def forward(self, turned: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.stride == (1, 1):
            return functional.conv2d(turned, self.weight.transpose(0, 1), self.bias, padding=self.before)
        return functional.conv_transpose2d(
            turned, self.turned_weight(), self.bias, self.stride, self.before, self.output_padding
        )

    def turned_weight(self) -> Tensor:
        """[C, outputs, kernel, kernel]"""
        return self.weight.flip(2, 3)
