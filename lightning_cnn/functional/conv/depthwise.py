"""One filter a channel: a weighted sum of shifted pictures, and for the weights one inner product a shift.

The plain form of what `lightning_cnn.kernels.depthwise` does in registers.

Source: Sifre 2014, "Rigid-motion scattering for image classification", section 6.2; Chollet 2017, arXiv:1610.02357.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_cnn.functional.conv.geometry import PLAIN, Geometry, Pair, gradient_as_forward, output_size


def forward(x: Float[Tensor, "b c h w"], weight: Float[Tensor, "c 1 r s"], geometry: Geometry = PLAIN) -> Float[Tensor, "b c ho wo"]:
    """y = sum over taps of w[tap] times x shifted by the tap."""
    _, _, r, s = weight.shape
    size = output_size((x.shape[2], x.shape[3]), (r, s), geometry)
    terms = (weight[:, :, i, j, None] * _shifted(x, (i, j), size, geometry) for i in range(r) for j in range(s))
    return torch.stack(list(terms)).sum(0)


def input_gradient(
    g: Float[Tensor, "b c ho wo"], weight: Float[Tensor, "c 1 r s"], size: Pair, geometry: Geometry = PLAIN
) -> Float[Tensor, "b c h w"]:
    """The forward convolution of g with the mirrored filters; needs stride one."""
    return forward(*gradient_as_forward(g, weight, geometry))


def weight_gradient(
    x: Float[Tensor, "b c h w"], g: Float[Tensor, "b c ho wo"], size: Pair, geometry: Geometry = PLAIN
) -> Float[Tensor, "c 1 r s"]:
    """gw[tap] = the inner product of g with x shifted by the tap."""
    shape = (g.shape[2], g.shape[3])
    taps = [torch.einsum("bchw,bchw->c", g, _shifted(x, (i, j), shape, geometry)) for i in range(size[0]) for j in range(size[1])]
    return torch.stack(taps, 1).reshape(-1, 1, *size)


def _shifted(x: Tensor, tap: Pair, size: Pair, geometry: Geometry) -> Tensor:
    stride, padding, dilation, _ = geometry
    padded = F.pad(x, (padding[1],) * 2 + (padding[0],) * 2)
    (top, left), (high, wide) = (tap[0] * dilation[0], tap[1] * dilation[1]), size
    return padded[:, :, top : top + (high - 1) * stride[0] + 1 : stride[0], left : left + (wide - 1) * stride[1] + 1 : stride[1]]
