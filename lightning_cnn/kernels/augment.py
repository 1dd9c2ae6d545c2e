"""Fused augmentation on the CPU: each picture is read once, bent, coloured and clamped while it is in the cache."""

import numpy as np
from numba import get_num_threads, njit, prange, set_num_threads

STRIP = 1024  # pixels
FAST = {"contract", "nsz", "arcp", "reassoc"}


@njit(cache=True, nogil=True, parallel=True, error_model="numpy", fastmath=FAST)
def _warp_colour(image, terms, lens, border, moves, colours, gain, pivot, light, out):
    samples, channels, height, width = out.shape
    high, wide = image.shape[2:]
    for b in prange(samples):
        if moves:
            rows = min(height, max(1, STRIP // width))  # the taps of a strip stay in the first-level cache
            offsets, weights = np.empty((4, rows * width), np.uint32), np.empty((4, rows * width), np.float32)
            for first in range(0, height, rows):
                last = min(first + rows, height)
                for row in range(first, last):
                    _taps(row, (row - first) * width, width, height, high, wide, terms[b], lens, border, offsets, weights)
                for c in range(channels):
                    _gather(image[b, c].reshape(-1), offsets, weights, out[b, c].reshape(-1)[first * width : last * width])
        else:
            out[b] = image[b]
        if colours:
            _colour(out[b].reshape(channels, height * width), gain[b], pivot[b], light[b])


@njit(cache=True, nogil=True, fastmath=FAST)
def _taps(row, start, width, height, high, wide, t, lens, border, offsets, weights):
    """Where in a plane of the input the four neighbours of each pixel of a row lie, and what they weigh: zero outside."""
    zero, one = np.float32(0), np.float32(1)
    y = np.float32(row - (height - 1) * 0.5)
    middle = np.float32((width - 1) * 0.5)
    last_x, last_y = np.float32(wide - 1), np.float32(high - 1)
    o0, o1, o2, o3 = (offsets[0, start:], offsets[1, start:], offsets[2, start:], offsets[3, start:])
    w0, w1, w2, w3 = (weights[0, start:], weights[1, start:], weights[2, start:], weights[3, start:])
    for column in range(width):
        x = np.float32(column) - middle
        u = t[0, 0] + t[0, 1] * x + t[0, 2] * y
        v = t[1, 0] + t[1, 1] * x + t[1, 2] * y
        if lens:
            r2 = x * x + y * y
            r4 = r2 * r2
            u += (
                (t[0, 3] * x + t[0, 4] * y) * r2
                + (t[0, 5] * x + t[0, 6] * y) * r4
                + t[0, 7] * x * x
                + t[0, 8] * x * y
                + t[0, 9] * y * y
            )
            v += (
                (t[1, 3] * x + t[1, 4] * y) * r2
                + (t[1, 5] * x + t[1, 6] * y) * r4
                + t[1, 7] * x * x
                + t[1, 8] * x * y
                + t[1, 9] * y * y
            )
        if border:
            u, v = min(max(u, zero), last_x), min(max(v, zero), last_y)
        # A tap's weight is max(0, 1 - distance), so the taps are the clamped neighbours and none outside weighs anything.
        u, v = min(max(u, -one), last_x + one), min(max(v, -one), last_y + one)
        left, top = np.floor(u), np.floor(v)
        fx, fy = u - left, v - top
        west = (one - fx) * (left >= zero) * (left <= last_x)
        east = fx * (left < last_x)
        north = (one - fy) * (top >= zero) * (top <= last_y)
        south = fy * (top < last_y)
        x0, x1 = min(max(left, zero), last_x), min(left + one, last_x)
        y0, y1 = min(max(top, zero), last_y), min(top + one, last_y)
        upper, lower = np.uint32(np.int32(y0)) * np.uint32(wide), np.uint32(np.int32(y1)) * np.uint32(wide)
        o0[column], o1[column] = upper + np.uint32(np.int32(x0)), upper + np.uint32(np.int32(x1))
        o2[column], o3[column] = lower + np.uint32(np.int32(x0)), lower + np.uint32(np.int32(x1))
        w0[column], w1[column] = north * west, north * east
        w2[column], w3[column] = south * west, south * east


@njit(cache=True, nogil=True, fastmath=FAST)
def _gather(plane, offsets, weights, out):
    for column in range(out.shape[0]):
        out[column] = (
            weights[0, column] * plane[offsets[0, column]]
            + weights[1, column] * plane[offsets[1, column]]
            + weights[2, column] * plane[offsets[2, column]]
            + weights[3, column] * plane[offsets[3, column]]
        )


@njit(cache=True, nogil=True, fastmath=FAST)
def _colour(picture, gain, pivot, light):
    channels, pixels = picture.shape
    zero, one = np.float32(0), np.float32(1)
    if channels == 1:
        g, o = gain[0].sum(), np.float32(pivot[0] * _sum(picture[0]) / pixels + light[0])
        for i in range(pixels):
            picture[0, i] = min(max(g * picture[0, i] + o, zero), one)
        return
    mean = (0.299 * _sum(picture[0]) + 0.587 * _sum(picture[1]) + 0.114 * _sum(picture[2])) / pixels
    o0, o1, o2 = np.float32(pivot[0] * mean + light[0]), np.float32(pivot[1] * mean + light[1]), np.float32(pivot[2] * mean + light[2])
    g00, g01, g02, g10, g11, g12, g20, g21, g22 = (
        gain[0, 0], gain[0, 1], gain[0, 2], gain[1, 0], gain[1, 1], gain[1, 2], gain[2, 0], gain[2, 1], gain[2, 2],
    )  # fmt: skip
    reds, greens, blues = picture[0], picture[1], picture[2]
    for i in range(pixels):
        red, green, blue = reds[i], greens[i], blues[i]
        reds[i] = min(max(g00 * red + g01 * green + g02 * blue + o0, zero), one)
        greens[i] = min(max(g10 * red + g11 * green + g12 * blue + o1, zero), one)
        blues[i] = min(max(g20 * red + g21 * green + g22 * blue + o2, zero), one)


@njit(cache=True, nogil=True, fastmath=FAST)
def _sum(values):
    total = np.float32(0)
    for i in range(values.shape[0]):
        total += values[i]
    return total


def warp_colour(image, terms, lens, border, moves, colours, gain, pivot, light, size, threads):
    """Resample `image` (b c h w, float32) and map its colours, in one pass over each picture.

    `terms` (b 2 10) gives the position in the input, in pixel indices, over the polynomials of `functional.warp`; the last seven count
    where `lens` is set. `gain` (b 3 3), `pivot` and `light` (b 3) are those of `functional.colour`.
    """
    out = np.empty((*image.shape[:2], *size), np.float32)
    before = get_num_threads()
    set_num_threads(max(1, min(threads, before)))
    try:
        _warp_colour(image, terms, lens, border, moves, colours, gain, pivot, light, out)
    finally:
        set_num_threads(before)
    return out
