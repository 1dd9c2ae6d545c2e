"""Noise inside a network, as functions of a key and of the rows' sample numbers: dropout, stochastic depth, DropConnect.

`key` is an int64 tensor, so that a new step is no new program under `torch.compile`; `rows` names the sample of each row. Equal
samples get equal noise in any batch and process; only DropConnect shares one draw over the batch, as its docstring says.

Shapes are `x` (b ...), `weight` (o i ...), `bias` (o), `key` () and `rows` (b); not annotated, because these functions are compiled
inside the user's network and the checker of annotations cannot be.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_cnn.functional import counter

IN, OUT = 0x2545F4914F6CDD1D, 0x1B03738712FAD5C9  # arbitrary odd words: one stream each for the signs of inputs and outputs

Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def dropout(x: Tensor, p: float, key: Tensor, rows: Tensor) -> Tensor:
    """Zero each feature of a vector, or each channel of a map, with probability `p`; the rest is scaled so that the mean stays.

    Whole channels, because neighbours in a map carry the same news (Tompson et al. 2015, "Efficient object localization using
    convolutional networks", section 3.2); plain dropout is Srivastava et al. 2014.
    """
    if p == 1:
        return torch.zeros_like(x)
    wide = x.shape[1:] if x.ndim < 4 else x.shape[1:2]
    keep = _uniform(key, rows, wide.numel()).view(len(rows), *wide, *[1] * (x.ndim - 1 - len(wide))) >= p
    return x * (keep / (1 - p)).to(x.dtype)


def stochastic_depth(x: Tensor, p: float, key: Tensor, rows: Tensor) -> Tensor:
    """Zero the whole residual branch `x` of a sample with probability `p`, and scale the others by 1 / (1 - p).

    Source: Huang et al. 2016, "Deep networks with stochastic depth", arXiv:1603.09382; it departs by dropping per sample, not per
    batch, and by scaling in training instead of testing, so that evaluation is the plain network.
    """
    if p == 1:
        return torch.zeros_like(x)
    keep = _uniform(key, rows, 1).view(len(rows), *[1] * (x.ndim - 1)) >= p
    return x * (keep / (1 - p)).to(x.dtype)


def dropconnect(
    convolve: Convolve,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    key: Tensor,
    rows: Tensor,
    channel_axis: int,
) -> Tensor:
    """`convolve(x, mask * weight, bias)` with a weight mask of its own for every sample, for the price of two layers.

    No weight a sample is built. Let a weight be dropped with probability p <= 1/2: draw once for the batch whether it *may* be
    (probability 2p) and a sign e; sample b drops it when e times the sample's signs for its output and its input is +1. Signs of the
    sample pass through the layer, so the mask needs two products in all:

        M_b = 1 - D (1 + e r_b s_b) / 2,    y_b = (W - D W / 2) x_b - r_b [(D e W / 2) (s_b x_b)]

    Seen alone, every sample's mask is exactly independent Bernoulli(1 - p); two samples' masks are independent at p = 1/2 and share
    which weights may be dropped below it (correlation (1/2 - p) / (1 - p)). Above 1/2 the roles of dropping and keeping swap. Scaled
    by 1 / (1 - p), so that the mean is the plain layer.

    Source: Wan et al. 2013, "Regularization of neural networks using DropConnect"; the signs are from Wen et al. 2018, "Flipout",
    arXiv:1803.04386, section 3. Departs from Wan: the bias is kept, and evaluation is the plain layer instead of a Gaussian draw.
    """
    if p == 1:
        return convolve(x, torch.zeros_like(weight), bias)
    steady, signed = dropconnect_weights(weight, p, key)
    inward, outward = (_signs(key ^ word, rows, n, x.dtype) for word, n in ((IN, x.shape[channel_axis]), (OUT, weight.shape[0])))
    noise = convolve(x * _on_axis(inward, x, channel_axis), signed, None)
    return convolve(x, steady, bias) + noise * _on_axis(outward, noise, channel_axis)


def dropconnect_weights(weight: Tensor, p: float, key: Tensor) -> tuple[Tensor, Tensor]:
    """The two weights of `dropconnect`: sample b's masked weight is `steady + r_b s_b * signed`."""
    words = counter.bits(key, torch.arange(weight.numel(), device=weight.device)).view(weight.shape)
    may_change = ((words >> 8) & 0xFFFFFF).float() * 2.0**-24 < 2 * min(p, 1 - p)
    half = torch.where(may_change, weight, 0) * (0.5 / (1 - p))
    signed = torch.where((words & 1).bool(), half, -half)
    return (weight / (1 - p) - half if p <= 0.5 else half), signed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _uniform(key: Tensor, rows: Tensor, n: int) -> Tensor:
    return counter.uniform(key, _counters(rows, n))


def _signs(key: Tensor, rows: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    return ((counter.bits(key, _counters(rows, n)) & 1) * 2 - 1).to(dtype)


def _counters(rows: Tensor, n: int) -> Tensor:
    return (rows[:, None] << 32) + torch.arange(n, device=rows.device)


def _on_axis(signs: Tensor, x: Tensor, axis: int) -> Tensor:
    shape = [1] * x.ndim
    shape[0], shape[axis] = signs.shape
    return signs.view(shape)
