"""Convolution as a product of spectra: its cost does not grow with the filter, so it wins where filters are large.

Two forward transforms, one multiplication a frequency (a matrix product over channels), one transform back. The two gradients
conjugate a different factor. A stride is computed in full and thinned out afterwards; half precision is computed in float32.

Source: Mathieu, Henaff & LeCun 2013, "Fast training of convolutional networks through FFTs", arXiv:1312.5851, section 2.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from lightning_cnn.functional.conv.geometry import PLAIN, Geometry, Pair, fast_size, output_size, span, spread


def forward(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "k c_g r s"],
    geometry: Geometry = PLAIN,
    transformed: Complex[Tensor, "k c_g fh fw"] | None = None,
) -> Float[Tensor, "b k ho wo"]:
    """y = x * w; `transformed` is `transform(weight, ...)` where the caller has kept it."""
    size = (x.shape[2], x.shape[3])
    high, wide = output_size(size, (weight.shape[2], weight.shape[3]), geometry)
    frequencies = transform_size(size, geometry)
    W = transform(weight, size, geometry) if transformed is None else transformed
    X = _rfft(F.pad(x, (geometry.padding[1],) * 2 + (geometry.padding[0],) * 2), frequencies)
    y = torch.fft.irfft2(_over_input_channels(X, W.conj_physical(), geometry.groups), s=frequencies)
    vertical, horizontal = geometry.stride
    return y[:, :, : high * vertical : vertical, : wide * horizontal : horizontal].to(x.dtype)


def input_gradient(
    g: Float[Tensor, "b k ho wo"],
    weight: Float[Tensor, "k c_g r s"],
    size: Pair,
    geometry: Geometry = PLAIN,
    transformed: Complex[Tensor, "k c_g fh fw"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """The full convolution of g with the filters, cut to the picture's `size`."""
    frequencies = transform_size(size, geometry)
    W = transform(weight, size, geometry) if transformed is None else transformed
    G = _rfft(spread(g, geometry.stride), frequencies)
    by_input = W.unflatten(0, (geometry.groups, -1)).transpose(1, 2).flatten(0, 1)
    gx = torch.fft.irfft2(_over_input_channels(G, by_input, geometry.groups), s=frequencies)
    top, left = geometry.padding
    return gx[:, :, top : top + size[0], left : left + size[1]].to(g.dtype)


def weight_gradient(
    x: Float[Tensor, "b c h w"], g: Float[Tensor, "b k ho wo"], size: Pair, geometry: Geometry = PLAIN
) -> Float[Tensor, "k c_g r s"]:
    """The correlation of x with g, at the taps."""
    frequencies = transform_size((x.shape[2], x.shape[3]), geometry)
    X = _rfft(F.pad(x, (geometry.padding[1],) * 2 + (geometry.padding[0],) * 2), frequencies)
    G = _rfft(spread(g, geometry.stride), frequencies).conj_physical()
    taps = torch.fft.irfft2(_over_batch(X, G, geometry.groups), s=frequencies)
    high, wide = span(size, geometry.dilation)
    return taps[:, :, : high : geometry.dilation[0], : wide : geometry.dilation[1]].to(x.dtype)


def transform(weight: Float[Tensor, "k c_g r s"], size: Pair, geometry: Geometry) -> Complex[Tensor, "k c_g fh fw"]:
    """The filters' spectrum for pictures of `size`."""
    return _rfft(spread(weight, geometry.dilation), transform_size(size, geometry))


def transform_size(size: Pair, geometry: Geometry) -> Pair:
    """The padded picture, rounded up: circular wrap-around then falls on outputs that are cut off."""
    return fast_size(size[0] + 2 * geometry.padding[0]), fast_size(size[1] + 2 * geometry.padding[1])


def _rfft(picture: Tensor, frequencies: Pair) -> Tensor:
    wide = picture if picture.dtype == torch.float64 else picture.float()
    return torch.fft.rfft2(wide, s=frequencies)


def _over_input_channels(X: Tensor, W: Tensor, groups: int) -> Tensor:
    """sum over c of X[b, c] W[k, c] at every frequency."""
    if W.shape[1] == 1 and W.shape[0] == groups:
        return X * W[:, 0]
    X, W = X.unflatten(1, (groups, -1)), W.unflatten(0, (groups, -1))
    return torch.einsum("bgchw,gkchw->bgkhw", X, W).flatten(1, 2)


def _over_batch(X: Tensor, G: Tensor, groups: int) -> Tensor:
    """sum over b of X[b, c] G[b, k] at every frequency, for the channels c and k of one group."""
    if X.shape[1] == G.shape[1] == groups:
        return (X * G).sum(0)[:, None]
    X, G = X.unflatten(1, (groups, -1)), G.unflatten(1, (groups, -1))
    return torch.einsum("bgchw,bgkhw->gkchw", X, G).flatten(0, 1)
