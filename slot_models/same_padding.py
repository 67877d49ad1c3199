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


class SameConvTranspose2d(nn.ConvTranspose2d):
    """The adjoint of SameConv2d: [B, C, H, W] -> [B, outputs, H stride, W stride].

    Raises:
        ValueError: the kernel is smaller than the stride, which would leave pixels without any input.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        if kernel < stride:
            raise ValueError(f"kernel: {kernel} is less than the stride {stride}; take a larger one")
        before, _ = same_padding(kernel, stride)
        super().__init__(inputs, outputs, kernel, stride, padding=before)
        self.factor = stride

    def forward(self, inputs: Tensor, output_size: list[int] | None = None) -> Tensor:
        height, width = inputs.shape[-2:]
        outputs = super().forward(inputs, output_size)
        return outputs[..., : height * self.factor, : width * self.factor]  # drops the odd row and column at the end
