"""What a stack of convolutions sees and costs.

Three small filters see what one large filter sees, with fewer weights and multiplications; C inputs, C outputs, weights a position:

>>> C = 64
>>> receptive_field([3, 3, 3]) == receptive_field([7])
True
>>> 3 * conv_weights(C, C, 3) == 27 * C**2, conv_weights(C, C, 7) == 49 * C**2
(True, True)
>>> bottleneck = conv_weights(C, C // 2, 1) + conv_weights(C // 2, C // 2, 3) + conv_weights(C // 2, C, 1)
>>> bottleneck == 3.25 * C**2, conv_weights(C, C, 3) == 9 * C**2
(True, True)
>>> conv_weights(C, C, (1, 3)) + conv_weights(C, C, (3, 1)) == 6 * C**2
True

Source: CS231n 2016, lecture 11, "How to stack them".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, prod


def receptive_field(kernels: Sequence[int], strides: Sequence[int] | None = None, dilations: Sequence[int] | None = None) -> int:
    """Input pixels, along one axis, seen by one output pixel of a stack.

    >>> receptive_field([3, 3, 3])  # three 3x3 see what one 7x7 sees
    7
    >>> receptive_field([7, 3], strides=[2, 2])
    11
    """
    field = Field()
    ones = [1] * len(kernels)
    for kernel, stride, dilation in zip(kernels, strides or ones, dilations or ones, strict=True):
        field = field.through(kernel, stride, dilation=dilation)
    return field.size


def conv_weights(inputs: int, outputs: int, kernel: int | tuple[int, int], groups: int = 1) -> int:
    """Weights of a convolution without its bias: as many as its multiply-adds for one output position.

    >>> conv_weights(8, 16, (3, 5))
    1920
    """
    return inputs // groups * outputs * prod((kernel, kernel) if isinstance(kernel, int) else kernel)


def conv_multiply_adds(inputs: int, outputs: int, kernel: int | tuple[int, int], size: tuple[int, int], groups: int = 1) -> int:
    """Multiply-adds of a convolution for one picture with `size` (height, width) output positions.

    >>> conv_multiply_adds(3, 64, 7, (112, 112))  # the first layer of ResNet
    118013952
    """
    return conv_weights(inputs, outputs, kernel, groups) * prod(size)


@dataclass(frozen=True)
class Field:
    """Along one axis, output pixel i sees the input from `low + i * stride` to `high + i * stride`, both included.

    Pixels outside of the picture are padding. A field with stride 0 is the same for every output pixel (after a global pooling).

    >>> Field().through(7, 2, padding=3).through(3, 2, padding=1)  # the stem of ResNet
    Field(low=-5, high=5, stride=4)
    """

    low: int | float = 0
    high: int | float = 0
    stride: int | float = 1

    @property
    def size(self) -> int:
        return floor(self.high - self.low) + 1

    @property
    def offset(self) -> int | float:
        """Centre of what output pixel 0 sees."""
        return (self.low + self.high) / 2

    def through(self, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> "Field":
        """After a convolution or pooling; a crop or a step is a kernel of 1 with a negative padding."""
        low = self.low - padding * self.stride
        return Field(low, self.high + ((kernel - 1) * dilation - padding) * self.stride, self.stride * stride)

    def transposed(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> "Field":
        """After a transposed convolution: tight bounds, and exact with stride 1."""
        step = self.stride / stride
        return Field(self.low + (padding - (kernel - 1) * dilation) * step, self.high + padding * step, step)

    def resized(self, inputs: int, outputs: int, reach: int | float = 0) -> "Field":
        """After a resampling or adaptive pooling of `inputs` pixels to `outputs`, that reads `reach` pixels beyond its cell."""
        step = self.stride * inputs / outputs
        if outputs > 1 and inputs % outputs == 0 and not reach:
            return self.through(inputs // outputs, inputs // outputs)
        return Field(self.low - (1 + reach) * self.stride, self.high + step + reach * self.stride, step)

    def whole(self, pixels: int, picture: int) -> "Field":
        """What `pixels` of them see together, inside of a `picture` of so many pixels."""
        last = (pixels - 1) * self.stride
        return Field(max(0, self.low), min(picture - 1, self.high + last), 0)

    def join(self, other: "Field") -> "Field":
        """What an output sees that reads both, pixel by pixel (a residual, a concatenation of branches)."""
        if self.stride != other.stride:
            raise ValueError(f"Fields with strides {self.stride} and {other.stride} do not meet pixel by pixel. Take whole() of both.")
        return Field(min(self.low, other.low), max(self.high, other.high), self.stride)
