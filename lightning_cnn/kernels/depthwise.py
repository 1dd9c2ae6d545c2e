"""Depthwise convolution and its weight gradient, eight channels a vector: both are one correlation of two small pictures.

`y[h, w] = sum over taps of weight[tap] * x[h, w shifted by tap]` and `gw[tap] = sum over pixels of g[pixel] * x[pixel shifted by
tap]` differ only in what is summed and what is shifted, so one register-blocked loop computes both. Planes are gathered eight
channels at a time into a padded scratch picture, from either memory layout.

Source: Zhang et al. 2018, "High performance zero-memory overhead direct convolutions", arXiv:1809.10170 (the idea: no workspace,
blocked channels).
"""

import numpy as np
from numba import float32, int64, njit, prange, void

from lightning_cnn.kernels.microkernel import LANES, copy_8, correlate_8, transpose_8x8

PICTURES = float32[:, :, :, :]


@njit(cache=True, nogil=True, error_model="numpy")
def _line(picture, n, first, h, w, many, scratch, at, write):
    """Move `many` pixels of eight channels between a picture in either layout and the scratch, transposing eight by eight."""
    sn, sc, sh, sw = picture.strides
    start, channel, pixel = (n * sn + first * sc + h * sh + w * sw) // 4, sc // 4, sw // 4
    whole = first + LANES <= picture.shape[1]
    if whole and channel == 1:
        for i in range(many):
            if write:
                copy_8(scratch, at + i * LANES, picture, start + i * pixel)
            else:
                copy_8(picture, start + i * pixel, scratch, at + i * LANES)
    elif whole and pixel == 1 and many >= LANES:
        for block in range(0, many, LANES):
            i = min(block, many - LANES)  # The last block overlaps the one before it
            if write:
                transpose_8x8(scratch, at + i * LANES, picture, start + i, LANES, channel)
            else:
                transpose_8x8(picture, start + i, scratch, at + i * LANES, channel, LANES)
    else:
        for lane in range(min(LANES, picture.shape[1] - first)):
            for i in range(many):
                if write:
                    picture[n, first + lane, h, w + i] = scratch[at + i * LANES + lane]
                else:
                    scratch[at + i * LANES + lane] = picture[n, first + lane, h, w + i]


@njit(cache=True, nogil=True, error_model="numpy")
def _gather(picture, n, first, top, left, height, width, scratch):
    # Eight channels of picture n behind a border, which is zero from the start and never written
    _, _, H, W = picture.shape
    begin, end = max(0, left), min(width, W + left)
    for h in range(max(0, top), min(height, H + top)):
        if end > begin:
            _line(picture, n, first, h - top, begin - left, end - begin, scratch, (h * width + begin) * LANES, False)


@njit(inline="always", error_model="numpy")
def _correlate(a, b, at, outer, inner, b_outer, step, shift, out, out_at):
    if step == 1 and shift == 1:  # Constant steps: neighbouring sums share their loads
        correlate_8(a, 0, b, at, outer, inner, b_outer, LANES, LANES, out, out_at)
    else:
        correlate_8(a, 0, b, at, outer, inner, b_outer, step * LANES, shift * LANES, out, out_at)


@njit(void(PICTURES, PICTURES, float32[:], PICTURES, *[int64] * 7), cache=True, nogil=True, parallel=True, error_model="numpy")
def depthwise(x, weight, bias, y, top, left, stride_h, stride_w, dilation_h, dilation_w, workers):
    """Write `y` (n, c, ho, wo) from `x` (n, c, h, w), one filter `weight` (c, 1, r, s) a channel; `top` and `left` may be negative."""
    N, C, Ho, Wo = y.shape
    _, _, R, S = weight.shape
    groups = (C + LANES - 1) // LANES
    across = (Wo + LANES - 1) // LANES * LANES
    height, width = (Ho - 1) * stride_h + (R - 1) * dilation_h + 1, (across - 1) * stride_w + (S - 1) * dilation_w + 1
    for worker in prange(workers):
        source, row = np.zeros(height * width * LANES, np.float32), np.empty(across * LANES, np.float32)
        taps, offset = np.empty(R * S * LANES, np.float32), np.zeros(LANES, np.float32)
        for piece in range(worker * N * groups // workers, (worker + 1) * N * groups // workers):
            n, first = piece // groups, piece % groups * LANES
            _gather(x, n, first, top, left, height, width, source)
            for lane in range(min(LANES, C - first)):
                for r in range(R):
                    for s in range(S):
                        taps[(r * S + s) * LANES + lane] = weight[first + lane, 0, r, s]
            for lane in range(min(LANES, C - first)):
                offset[lane] = bias[first + lane]
            for h in range(Ho):
                for w in range(across):
                    copy_8(offset, 0, row, w * LANES)
                for w in range(0, across, LANES):
                    at = (h * stride_h * width + w * stride_w) * LANES
                    _correlate(taps, source, at, R, S, dilation_h * width * LANES, dilation_w, stride_w, row, w * LANES)
                _line(y, n, first, h, 0, Wo, row, 0, True)


@njit(void(PICTURES, PICTURES, PICTURES, *[int64] * 7), cache=True, nogil=True, parallel=True, error_model="numpy")
def depthwise_weight(x, g, gw, top, left, stride_h, stride_w, dilation_h, dilation_w, workers):
    """Write the weight gradient `gw` (c, 1, r, s) from `x` (n, c, h, w) and the output's gradient `g` (n, c, ho, wo)."""
    N, C, Ho, Wo = g.shape
    _, _, R, S = gw.shape
    groups = (C + LANES - 1) // LANES
    across = (S + LANES - 1) // LANES * LANES
    height, width = (Ho - 1) * stride_h + (R - 1) * dilation_h + 1, (Wo - 1) * stride_w + (across - 1) * dilation_w + 1
    for worker in prange(workers):
        source, gradient = np.zeros(height * width * LANES, np.float32), np.empty(Ho * Wo * LANES, np.float32)
        sums = np.empty(R * across * LANES, np.float32)
        for group in range(worker * groups // workers, (worker + 1) * groups // workers):
            first = group * LANES
            sums[:] = 0
            for n in range(N):
                _gather(x, n, first, top, left, height, width, source)
                _gather(g, n, first, 0, 0, Ho, Wo, gradient)
                for r in range(R):
                    for s in range(0, across, LANES):
                        at = (r * dilation_h * width + s * dilation_w) * LANES
                        _correlate(
                            gradient, source, at, Ho, Wo, stride_h * width * LANES, stride_w, dilation_w, sums, (r * across + s) * LANES
                        )
            for lane in range(min(LANES, C - first)):
                for r in range(R):
                    for s in range(S):
                        gw[first + lane, 0, r, s] = sums[(r * across + s) * LANES + lane]
