"""Convolution as a product of spectra: its cost does not grow with the filter, so it wins where filters are large.

Two forward transforms, one multiplication a frequency (a matrix product over channels), one transform back. The two gradients
conjugate a different factor. A stride is computed in full and thinned out afterwards; half precision is computed in float32.

Source: Mathieu, Henaff & LeCun 2013, "Fast training of convolutional networks through FFTs", arXiv:1312.5851, section 2.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from lightning_cnn.functional.conv.geometry import PLAIN, Geometry, Pair, fast_size, output_size, span, spread

FILLED = 2**22  # pixels of filters that are filled with zeros at a time
Contract = Callable[[Tensor, Tensor, str], Tensor]


def contract(a: Complex[Tensor, "g i r h w"], b: Complex[Tensor, "g j r h w"], conjugate: str = "") -> Complex[Tensor, "g i j h w"]:
    """The sum over r of a[g, i, r] b[g, j, r] at every frequency; `conjugate` names the factor to conjugate, 'a' or 'b'.

    Every convolution by Fourier transforms is this one product; `lightning_cnn.kernels.spectra` computes it faster.
    """
    a, b = a.conj_physical() if conjugate == "a" else a, b.conj_physical() if conjugate == "b" else b
    return torch.einsum("girhw,gjrhw->gijhw", a, b)


def forward(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "k c_g r s"],
    geometry: Geometry = PLAIN,
    transformed: Complex[Tensor, "k c_g fh fw"] | None = None,
    contract: Contract = contract,
) -> Float[Tensor, "b k ho wo"]:
    """y = x * w; `transformed` is `transform(weight, ...)` where the caller has kept it."""
    size = (x.shape[2], x.shape[3])
    high, wide = output_size(size, (weight.shape[2], weight.shape[3]), geometry)
    frequencies = transform_size(size, (weight.shape[2], weight.shape[3]), geometry)
    W = transform(weight, size, geometry) if transformed is None else transformed
    X = _rfft_behind_padding(x, frequencies, geometry)
    y = torch.fft.irfft2(over_input_channels(X, W, geometry.groups, contract), s=frequencies)
    vertical, horizontal = geometry.stride
    return y[:, :, : high * vertical : vertical, : wide * horizontal : horizontal].to(x.dtype)


def input_gradient(
    g: Float[Tensor, "b k ho wo"],
    weight: Float[Tensor, "k c_g r s"],
    size: Pair,
    geometry: Geometry = PLAIN,
    transformed: Complex[Tensor, "k c_g fh fw"] | None = None,
    contract: Contract = contract,
) -> Float[Tensor, "b c h w"]:
    """The full convolution of g with the filters, cut to the picture's `size`."""
    frequencies = transform_size(size, (weight.shape[2], weight.shape[3]), geometry)
    W = transform(weight, size, geometry) if transformed is None else transformed
    G = _rfft(spread(g, geometry.stride), frequencies)
    gx = torch.fft.irfft2(over_output_channels(G, W, geometry.groups, contract), s=frequencies)
    top, left = geometry.padding
    return gx[:, :, top : top + size[0], left : left + size[1]].to(g.dtype)


def weight_gradient(
    x: Float[Tensor, "b c h w"],
    g: Float[Tensor, "b k ho wo"],
    size: Pair,
    geometry: Geometry = PLAIN,
    contract: Contract = contract,
) -> Float[Tensor, "k c_g r s"]:
    """The correlation of x with g, at the taps."""
    frequencies = transform_size((x.shape[2], x.shape[3]), size, geometry)
    X = _rfft_behind_padding(x, frequencies, geometry)
    G = _rfft(spread(g, geometry.stride), frequencies)
    taps = torch.fft.irfft2(over_pictures(X, G, geometry.groups, contract), s=frequencies)
    high, wide = span(size, geometry.dilation)
    return taps[:, :, : high : geometry.dilation[0], : wide : geometry.dilation[1]].to(x.dtype)


def transform(weight: Float[Tensor, "k c_g r s"], size: Pair, geometry: Geometry) -> Complex[Tensor, "k c_g fh fw"]:
    """The filters' spectrum for pictures of `size`."""
    return spectrum(weight, transform_size(size, (weight.shape[2], weight.shape[3]), geometry), geometry)


def spectrum(weight: Float[Tensor, "k c_g r s"], frequencies: Pair, geometry: Geometry) -> Complex[Tensor, "k c_g fh fw"]:
    """The filters' spectrum, some filters at a time: filled with zeros to a picture's size, all together would take as much again."""
    at_once = filters_at_once(weight.shape[1], frequencies)
    if at_once >= len(weight):
        return _rfft(spread(weight, geometry.dilation), frequencies)
    kind = torch.complex128 if weight.dtype == torch.float64 else torch.complex64
    W = torch.empty((*weight.shape[:2], frequencies[0], frequencies[1] // 2 + 1), dtype=kind, device=weight.device)
    for filters, out in zip(weight.split(at_once), W.split(at_once), strict=True):
        out.copy_(_rfft(spread(filters, geometry.dilation), frequencies))
    return W


def filters_at_once(channels: int, frequencies: Pair) -> int:
    return max(1, FILLED // (channels * frequencies[0] * frequencies[1]))


def transform_size(size: Pair, kernel: Pair, geometry: Geometry) -> Pair:
    """The picture with its padding counted once, rounded up: what wraps around at the end finds the zeros at the beginning.

    >>> transform_size((64, 64), (31, 31), Geometry(padding=(15, 15)))  # and not 96, for 64 + 2 * 15
    (80, 80)
    """
    reach = span(kernel, geometry.dilation)
    high, wide = (max(n + p, n + 2 * p + 1 - r, r) for n, p, r in zip(size, geometry.padding, reach, strict=True))
    return fast_size(high), fast_size(wide)


def _rfft(picture: Tensor, frequencies: Pair) -> Tensor:
    wide = picture if picture.dtype == torch.float64 else picture.float()
    return torch.fft.rfft2(wide, s=frequencies)


def _rfft_behind_padding(x: Tensor, frequencies: Pair, geometry: Geometry) -> Tensor:
    top, left = geometry.padding
    return _rfft(F.pad(x, (left, frequencies[1] - x.shape[3] - left, top, frequencies[0] - x.shape[2] - top)), frequencies)


def over_input_channels(X: Tensor, W: Tensor, groups: int, contract: Contract = contract) -> Tensor:
    """The spectrum of y: the sum over c of X[b, c] conj(W[k, c])."""
    if W.shape[1] == 1 and W.shape[0] == groups:
        return X * W[:, 0].conj_physical()
    X, W = X.unflatten(1, (groups, -1)).transpose(0, 1), W.unflatten(0, (groups, -1))
    return contract(X, W, "b").transpose(0, 1).flatten(1, 2)


def over_output_channels(G: Tensor, W: Tensor, groups: int, contract: Contract = contract) -> Tensor:
    """The spectrum of the input's gradient: the sum over k of G[b, k] W[k, c]."""
    if W.shape[1] == 1 and W.shape[0] == groups:
        return G * W[:, 0]
    G, W = G.unflatten(1, (groups, -1)).transpose(0, 1), W.unflatten(0, (groups, -1))
    return contract(G, W.transpose(1, 2), "").transpose(0, 1).flatten(1, 2)


def over_pictures(X: Tensor, G: Tensor, groups: int, contract: Contract = contract) -> Tensor:
    """The spectrum of the weight's gradient: the sum over b of conj(G[b, k]) X[b, c], for the channels of one group."""
    if X.shape[1] == G.shape[1] == groups:
        return (X * G.conj_physical()).sum(0)[:, None]
    X, G = (P.unflatten(1, (groups, -1)).movedim(0, 2) for P in (X, G))
    return contract(G, X, "a").flatten(0, 1)
