"""Convolution as one matrix product: write the r x s x c pixels under every position of the filter as a column, then multiply.

The lecture's first way. It turns a convolution into the routine that libraries tune best, and pays with r x s copies of the picture.

Source: Chellapilla et al. 2006, "High performance convolutional neural networks for document processing", section 3; CS231n 2016,
lecture 11, "Implementing convolutions: im2col".
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_cnn.functional.conv.geometry import PLAIN, Geometry, Pair, output_size


def forward(x: Float[Tensor, "b c h w"], weight: Float[Tensor, "k c_g r s"], geometry: Geometry = PLAIN) -> Float[Tensor, "b k ho wo"]:
    """y = W @ columns(x)."""
    k, c, r, s = weight.shape
    size = output_size((x.shape[2], x.shape[3]), (r, s), geometry)
    y = weight.reshape(geometry.groups, k // geometry.groups, c * r * s) @ columns(x, (r, s), geometry)
    return y.reshape(x.shape[0], k, *size)


def input_gradient(
    g: Float[Tensor, "b k ho wo"], weight: Float[Tensor, "k c_g r s"], size: Pair, geometry: Geometry = PLAIN
) -> Float[Tensor, "b c h w"]:
    """gx = the columns W^T @ g, each added back where it was read."""
    stride, padding, dilation, groups = geometry
    k, c, r, s = weight.shape
    column = weight.reshape(groups, k // groups, c * r * s).mT @ g.reshape(g.shape[0], groups, k // groups, -1)
    return F.fold(column.flatten(1, 2), size, (r, s), dilation, padding, stride)


def weight_gradient(
    x: Float[Tensor, "b c h w"], g: Float[Tensor, "b k ho wo"], size: Pair, geometry: Geometry = PLAIN
) -> Float[Tensor, "k c_g r s"]:
    """gW = g @ columns(x)^T, summed over the batch."""
    k = g.shape[1]
    product = g.reshape(g.shape[0], geometry.groups, k // geometry.groups, -1) @ columns(x, size, geometry).mT
    return product.sum(0).reshape(k, x.shape[1] // geometry.groups, *size)


def columns(x: Float[Tensor, "b c h w"], kernel: Pair, geometry: Geometry) -> Float[Tensor, "b g crs n"]:
    """The pixels under each of the n positions of the filter, one column a position."""
    stride, padding, dilation, groups = geometry
    column = F.unfold(x, kernel, dilation, padding, stride)
    return column.reshape(x.shape[0], groups, -1, column.shape[2])
