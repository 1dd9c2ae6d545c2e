"""What every way to compute a convolution needs to know about its geometry, and the one fact behind both gradients.

A convolution y = x * w is linear in x and in w, so its two gradients are convolutions again: the input's gradient slides the mirrored
filters over g, and the weight's gradient slides g over x.

Source: Dumoulin & Visin 2016, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285, sections 2 and 4.
"""

from math import ceil, log2
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """Stride, zero padding and dilation as (vertical, horizontal), and the number of groups."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


PLAIN = Geometry()


def span(kernel: Pair, dilation: Pair) -> Pair:
    """The pixels a dilated kernel reaches over.

    >>> span((3, 3), (1, 2))
    (3, 5)
    """
    return (kernel[0] - 1) * dilation[0] + 1, (kernel[1] - 1) * dilation[1] + 1


def output_size(size: Pair, kernel: Pair, geometry: Geometry) -> Pair:
    """
    >>> output_size((224, 224), (7, 7), Geometry(stride=(2, 2), padding=(3, 3)))
    (112, 112)
    """
    reach = span(kernel, geometry.dilation)
    high, wide = ((size[i] + 2 * geometry.padding[i] - reach[i]) // geometry.stride[i] + 1 for i in (0, 1))
    return high, wide


def mirror(weight: Float[Tensor, "k c_g r s"], groups: int = 1) -> Float[Tensor, "c k_g r s"]:
    """The filters of the input's gradient: turned by 180 degrees, input and output channels exchanged within each group."""
    k, c, r, s = weight.shape
    swapped = weight.reshape(groups, k // groups, c, r, s).transpose(1, 2)
    return swapped.reshape(groups * c, k // groups, r, s).flip(2, 3)


def gradient_as_forward(
    g: Float[Tensor, "b k ho wo"], weight: Float[Tensor, "k c_g r s"], geometry: Geometry
) -> tuple[Tensor, Tensor, Geometry]:
    """Picture, filters and geometry whose forward convolution is the input's gradient of a convolution with stride one."""
    reach = span((weight.shape[2], weight.shape[3]), geometry.dilation)
    top, left = reach[0] - 1 - geometry.padding[0], reach[1] - 1 - geometry.padding[1]
    if min(top, left) < 0:  # More padding than the filter reaches: those outputs saw zeros alone, and are cut off
        g = F.pad(g, (min(left, 0), min(left, 0), min(top, 0), min(top, 0)))
    return g, mirror(weight, geometry.groups), geometry._replace(padding=(max(top, 0), max(left, 0)))


def spread(picture: Float[Tensor, "a b h w"], step: Pair) -> Float[Tensor, "a b hs ws"]:
    """The picture with `step - 1` zeros between neighbours: undoes a stride, or writes a dilation out.

    >>> import torch
    >>> spread(torch.ones(1, 1, 1, 3), (1, 2)).tolist()
    [[[[1.0, 0.0, 1.0, 0.0, 1.0]]]]
    """
    if step == (1, 1):
        return picture
    high, wide = span((picture.shape[2], picture.shape[3]), step)
    wide_picture = picture.new_zeros(*picture.shape[:2], high, wide)
    wide_picture[:, :, :: step[0], :: step[1]] = picture
    return wide_picture


def fast_size(n: int) -> int:
    """The next length whose Fourier transform is fast: a multiple of 4 (vectors of frequencies) without primes beyond 5.

    >>> [fast_size(n) for n in (7, 31, 62, 97)]
    [8, 32, 64, 100]
    """
    n += -n % 4
    while _largest_factor_beyond_five(n) > 1:
        n += 4
    return n


def tile_size(picture: Pair, kernel: Pair, planes: tuple[int, int, int] = (1, 1, 1), kept: bool = True) -> int:
    """The tile of `fft_tiled` that costs least, for `planes` pictures, channels and filters (a group's).

    Larger tiles waste less on the overlap; smaller ones need fewer frequencies of each filter, which are read from memory (and
    computed, unless they are `kept`). The unit of cost is a pixel's complex product; its transform costs 4 a factor of two of the
    tile's side and to read a frequency costs 5, as measured with `lightning_cnn.kernels.spectra`.

    >>> tile_size((224, 224), (7, 7)), tile_size((56, 56), (31, 31)), tile_size((56, 56), (31, 31), (1, 64, 64))
    (64, 96, 60)
    """
    reach, (b, c, k) = max(kernel), planes

    def cost(tile: int) -> float:
        fresh = tile - reach + 1
        tiles = b * ceil(picture[0] / fresh) * ceil(picture[1] / fresh)
        transform = 4 * log2(tile)
        return tile**2 * (tiles * ((c + k) * transform + c * k) + c * k * (5 + (not kept) * transform))

    largest = fast_size(max(*picture, 2) + reach - 1)
    return min({fast_size(tile) for tile in range(reach + 1, largest + 1)}, key=lambda tile: (cost(tile), tile))


def _largest_factor_beyond_five(n: int) -> int:
    for prime in (2, 3, 5):
        while n % prime == 0:
            n //= prime
    return n
