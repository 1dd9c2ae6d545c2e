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

from lightning_cnn.functional.conv import fft
from lightning_cnn.functional.conv.fft import Contract, contract
from lightning_cnn.functional.conv.geometry import PLAIN, Geometry, Pair, gradient_as_forward, output_size, span, tile_size


def forward(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "k c_g r s"],
    geometry: Geometry = PLAIN,
    transformed: Complex[Tensor, "k c_g t tf"] | None = None,
    contract: Contract = contract,
) -> Float[Tensor, "b k ho wo"]:
    """y = x * w for stride one; `transformed` is `transform(weight, tile, ...)` where the caller has kept it, for any tile."""
    reach = span((weight.shape[2], weight.shape[3]), geometry.dilation)
    size = output_size((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]), geometry)
    W = transform(weight, tile_size(size, reach), geometry) if transformed is None else transformed
    tile, fresh = W.shape[2], (W.shape[2] - reach[0] + 1, W.shape[2] - reach[1] + 1)
    tiles = _tiles(x, size, fresh, tile, geometry)
    X = fft._rfft(tiles.flatten(0, 2), (tile, tile))
    y = torch.fft.irfft2(fft.over_input_channels(X, W, geometry.groups, contract), s=(tile, tile))
    kept = y[:, :, : fresh[0], : fresh[1]].unflatten(0, tiles.shape[:3]).permute(0, 3, 1, 4, 2, 5)
    return kept.flatten(4, 5).flatten(2, 3)[:, :, : size[0], : size[1]].to(x.dtype)


def input_gradient(
    g: Float[Tensor, "b k ho wo"],
    weight: Float[Tensor, "k c_g r s"],
    size: Pair,
    geometry: Geometry = PLAIN,
    contract: Contract = contract,
) -> Float[Tensor, "b c h w"]:
    """The forward convolution of g with the mirrored filters."""
    return forward(*gradient_as_forward(g, weight, geometry), contract=contract)


def weight_gradient(
    x: Float[Tensor, "b c h w"],
    g: Float[Tensor, "b k ho wo"],
    size: Pair,
    geometry: Geometry = PLAIN,
    tile: int | None = None,
    contract: Contract = contract,
) -> Float[Tensor, "k c_g r s"]:
    """The sum over tiles of each tile's correlation with the gradients of the pixels it produced."""
    reach = span(size, geometry.dilation)
    tile = tile or tile_size((g.shape[2], g.shape[3]), reach)
    fresh = (tile - reach[0] + 1, tile - reach[1] + 1)
    tiles = _tiles(x, (g.shape[2], g.shape[3]), fresh, tile, geometry)
    pieces = F.pad(g, (0, tiles.shape[2] * fresh[1] - g.shape[3], 0, tiles.shape[1] * fresh[0] - g.shape[2]))
    pieces = pieces.unfold(2, fresh[0], fresh[0]).unfold(3, fresh[1], fresh[1]).permute(0, 2, 3, 1, 4, 5)
    X, G = (fft._rfft(part.flatten(0, 2), (tile, tile)) for part in (tiles, pieces))
    taps = torch.fft.irfft2(fft.over_pictures(X, G, geometry.groups, contract), s=(tile, tile))
    return taps[:, :, : reach[0] : geometry.dilation[0], : reach[1] : geometry.dilation[1]].to(x.dtype)


def transform(weight: Float[Tensor, "k c_g r s"], tile: int, geometry: Geometry) -> Complex[Tensor, "k c_g t tf"]:
    """The filters' spectrum on a tile."""
    return fft.spectrum(weight, (tile, tile), geometry)


def _tiles(x: Tensor, size: Pair, fresh: Pair, tile: int, geometry: Geometry) -> Tensor:
    """(b, down, across, c, tile, tile): tiles that overlap by the filter's reach and bring `fresh` pixels each."""
    bottom, right = (ceil(size[i] / fresh[i]) * fresh[i] + tile - fresh[i] - x.shape[2 + i] - geometry.padding[i] for i in (0, 1))
    padded = F.pad(x, (geometry.padding[1], right, geometry.padding[0], bottom))
    return padded.unfold(2, tile, fresh[0]).unfold(3, tile, fresh[1]).permute(0, 2, 3, 1, 4, 5)
