"""Convolve in the other memory layout and come back: pixels first (NCHW) or channels first (NHWC) decides which loop the library runs.

Exact to the bit or nearly so, and worth more than most algorithms where the library has no good loop for the layout at hand; the card
has the cases. Costs a copy of each picture.

Source: measured; see the card.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_cnn.functional.conv import default
from lightning_cnn.functional.conv.geometry import PLAIN, Geometry, Pair


def is_channels_last(picture: Float[Tensor, "b c h w"]) -> bool:
    """True where the channels of a pixel are neighbours in memory (and not merely by being the only ones)."""
    return picture.is_contiguous(memory_format=torch.channels_last) and not picture.is_contiguous()


def forward(x: Float[Tensor, "b c h w"], weight: Float[Tensor, "k c_g r s"], geometry: Geometry = PLAIN) -> Float[Tensor, "b k ho wo"]:
    """y = x * w, in the layout that x does not have."""
    here, there = _layouts(x)
    return default.forward(x.contiguous(memory_format=there), weight.contiguous(memory_format=there), geometry).contiguous(
        memory_format=here
    )


def input_gradient(
    g: Float[Tensor, "b k ho wo"], weight: Float[Tensor, "k c_g r s"], size: Pair, geometry: Geometry = PLAIN
) -> Float[Tensor, "b c h w"]:
    """The gradient of an input with `size` pixels, in the layout that g does not have."""
    here, there = _layouts(g)
    g, weight = g.contiguous(memory_format=there), weight.contiguous(memory_format=there)
    x = torch.empty((g.shape[0], weight.shape[1] * geometry.groups, *size), dtype=g.dtype, device=g.device, memory_format=there)
    return default._backward(g, x, weight, geometry, (True, False, False))[0].contiguous(memory_format=here)


def weight_gradient(
    x: Float[Tensor, "b c h w"], g: Float[Tensor, "b k ho wo"], size: Pair, geometry: Geometry = PLAIN
) -> Float[Tensor, "k c_g r s"]:
    """The gradient of filters with `size` taps, in the layout that x does not have."""
    here, there = _layouts(x)
    x, g = x.contiguous(memory_format=there), g.contiguous(memory_format=there)
    weight = torch.empty((g.shape[1], x.shape[1] // geometry.groups, *size), dtype=g.dtype, device=g.device, memory_format=there)
    return default._backward(g, x, weight, geometry, (False, True, False))[0].contiguous(memory_format=here)


def _layouts(picture: Tensor) -> tuple[torch.memory_format, torch.memory_format]:
    here, there = torch.contiguous_format, torch.channels_last
    return (there, here) if is_channels_last(picture) else (here, there)
