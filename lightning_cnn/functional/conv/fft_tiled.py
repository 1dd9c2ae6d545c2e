"""Convolution by Fourier transforms of small overlapping tiles: memory and work follow the filter, not the picture.

Each tile is transformed, multiplied and transformed back; of every result only the pixels without wrap-around are kept (overlap and
save). Needs stride one; dilation is written out as zeros in the filter.

Source: Highlander & Rodriguez 2016, "Very efficient training of convolutional neural networks using fast Fourier transform and
overlap-and-add", arXiv:1601.06815.
"""

from math import ceil

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from lightning_cnn.functional.conv.fft import _over_batch, _over_input_channels, _rfft
from lightning_cnn.functional.conv.geometry import PLAIN, Geometry, Pair, gradient_as_forward, output_size, span, spread, tile_size


def forward(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "k c_g r s"],
    geometry: Geometry = PLAIN,
    transformed: Complex[Tensor, "k c_g t tf"] | None = None,
) -> Float[Tensor, "b k ho wo"]:
    """y = x * w for stride one; `transformed` is `transform(weight, ...)` where the caller has kept it."""
    reach = span((weight.shape[2], weight.shape[3]), geometry.dilation)
    size = output_size((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]), geometry)
    tile = tile_size(size, reach)
    W = transform(weight, size, geometry) if transformed is None else transformed
    X = _rfft(_tiles(x, size, reach, tile, geometry), (tile, tile))
    b, _, down, across = X.shape[:4]
    Y = _over_input_channels(X.permute(0, 2, 3, 1, 4, 5).flatten(0, 2), W.conj_physical(), geometry.groups)
    kept = torch.fft.irfft2(Y, s=(tile, tile))[:, :, : tile - reach[0] + 1, : tile - reach[1] + 1]
    y = kept.unflatten(0, (b, down, across)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return y[:, :, : size[0], : size[1]].to(x.dtype)


def input_gradient(
    g: Float[Tensor, "b k ho wo"], weight: Float[Tensor, "k c_g r s"], size: Pair, geometry: Geometry = PLAIN
) -> Float[Tensor, "b c h w"]:
    """The forward convolution of g with the mirrored filters."""
    return forward(*gradient_as_forward(g, weight, geometry))


def weight_gradient(
    x: Float[Tensor, "b c h w"], g: Float[Tensor, "b k ho wo"], size: Pair, geometry: Geometry = PLAIN
) -> Float[Tensor, "k c_g r s"]:
    """The sum over tiles of each tile's correlation with the gradients of the pixels it produced."""
    reach = span(size, geometry.dilation)
    high, wide = g.shape[2], g.shape[3]
    tile = tile_size((high, wide), reach)
    X = _rfft(_tiles(x, (high, wide), reach, tile, geometry), (tile, tile))
    fresh = (tile - reach[0] + 1, tile - reach[1] + 1)
    pieces = F.pad(g, (0, X.shape[3] * fresh[1] - wide, 0, X.shape[2] * fresh[0] - high))
    pieces = pieces.unfold(2, fresh[0], fresh[0]).unfold(3, fresh[1], fresh[1])
    G = _rfft(pieces, (tile, tile)).conj_physical()
    X, G = (P.permute(0, 2, 3, 1, 4, 5).flatten(0, 2) for P in (X, G))
    product = _over_batch(X, G, geometry.groups)
    taps = torch.fft.irfft2(product, s=(tile, tile))
    return taps[:, :, : reach[0] : geometry.dilation[0], : reach[1] : geometry.dilation[1]].to(x.dtype)


def transform(weight: Float[Tensor, "k c_g r s"], size: Pair, geometry: Geometry) -> Complex[Tensor, "k c_g t tf"]:
    """The filters' spectrum on the tile chosen for outputs of `size`."""
    tile = tile_size(size, span((weight.shape[2], weight.shape[3]), geometry.dilation))
    return _rfft(spread(weight, geometry.dilation), (tile, tile))


def _tiles(x: Tensor, size: Pair, reach: Pair, tile: int, geometry: Geometry) -> Tensor:
    """(b, c, down, across, tile, tile): tiles that overlap by the filter's reach."""
    fresh = (tile - reach[0] + 1, tile - reach[1] + 1)
    bottom, right = (ceil(size[i] / fresh[i]) * fresh[i] + reach[i] - 1 - x.shape[2 + i] - geometry.padding[i] for i in (0, 1))
    padded = F.pad(x, (geometry.padding[1], right, geometry.padding[0], bottom))
    return padded.unfold(2, tile, fresh[0]).unfold(3, tile, fresh[1])
