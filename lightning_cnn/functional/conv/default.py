"""The convolution torch ships (oneDNN, cuDNN, ...), one function a pass: what every other way is compared with.

Source: `torch.nn.functional.conv2d`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_cnn.functional.conv.geometry import PLAIN, Geometry, Pair


def forward(x: Float[Tensor, "b c h w"], weight: Float[Tensor, "k c_g r s"], geometry: Geometry = PLAIN) -> Float[Tensor, "b k ho wo"]:
    """y = x * w."""
    stride, padding, dilation, groups = geometry
    return torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)


def input_gradient(
    g: Float[Tensor, "b k ho wo"], weight: Float[Tensor, "k c_g r s"], size: Pair, geometry: Geometry = PLAIN
) -> Float[Tensor, "b c h w"]:
    """The gradient of an input with `size` pixels, from the output's gradient `g`."""
    x = g.new_empty(1).expand(g.shape[0], weight.shape[1] * geometry.groups, *size)
    return _backward(g, x, weight, geometry, (True, False, False))[0]


def weight_gradient(
    x: Float[Tensor, "b c h w"], g: Float[Tensor, "b k ho wo"], size: Pair, geometry: Geometry = PLAIN
) -> Float[Tensor, "k c_g r s"]:
    """The gradient of filters with `size` taps, from the input and the output's gradient `g`."""
    weight = g.new_empty(1).expand(g.shape[1], x.shape[1] // geometry.groups, *size)
    return _backward(g, x, weight, geometry, (False, True, False))[0]


def _backward(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]) -> list[Tensor]:
    stride, padding, dilation, groups = geometry
    gradients = torch.ops.aten.convolution_backward(g, x, weight, None, stride, padding, dilation, False, (0, 0), groups, wanted)
    return [gradient for gradient in gradients if gradient is not None]
