"""Fused augmentation on the CPU: each picture is read once, bent, coloured and clamped while it is in the cache.

A picture is first laid out as pixels of four floats (three colours and a rest, or four channels at a time of any other picture) inside
a frame of zeros. An output pixel is then two vector loads and four vector operations for all its channels, and what lies outside the
picture needs no branch: its position is clamped to the frame.
"""

import numpy as np
from numba import njit, prange

from lightning_cnn.kernels import augment_terms
from lightning_cnn.kernels.pixel import bilinear
from lightning_cnn.kernels.threads import use

FAST = {"contract", "nsz", "arcp", "reassoc"}
LANES = 4
FRAME = 3  # one pixel of zeros before the first row and column, two after the last: a position on the frame reads its neighbour too


@njit(cache=True, nogil=True, parallel=True, error_model="numpy", fastmath=FAST)
def _in_parallel(threads, image, out, shape, size, u, light, knobs, lens, border, moves, colours):
    for first in prange(threads):
        _share(first, threads, image, out, shape, size, u, light, knobs, lens, border, moves, colours)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST)
def _share(first, step, image, out, shape, size, u, light, knobs, lens, border, moves, colours):
    """Every `step`-th picture of `image` (b c*h*w) and `out`; `shape` is that of the input (c h w), and the strides of c and of x."""
    framed = np.zeros((shape[1] + FRAME) * (shape[2] + FRAME) * LANES, np.float32)
    row = np.empty((size[1] + 1) * LANES, np.float32)
    at, fx, fy = np.empty(size[1], np.int32), np.empty(size[1], np.float32), np.empty(size[1], np.float32)
    terms, gain, pivot = np.zeros((2, 10), np.float32), np.zeros((3, 3), np.float32), np.zeros(3, np.float32)
    down = np.intp((shape[2] + FRAME) * LANES)
    for b in range(first, len(out), step):
        if moves:
            augment_terms.position(u[b], knobs, shape[1], shape[2], size[0], size[1], terms)
        else:
            out[b] = image[b]
        for group in range(0, shape[0] if moves else 0, LANES):
            _frame(image[b], shape, group, framed)
            for y in range(size[0]):
                _positions(terms, lens, border, y, shape, size, at, fx, fy)
                for x in range(size[1]):
                    bilinear(framed, np.intp(at[x]), down, fx[x], fy[x], row, np.intp(x * LANES))
                _deliver(row, y, group, shape, size, out[b])
        if colours:
            augment_terms.colour(u[b], knobs, gain, pivot)
            if shape[4] == 1:
                _colour(out[b], shape[0], size[0] * size[1], 1, size[0] * size[1], gain, pivot, light[b])
            else:
                _colour(out[b], shape[0], size[0] * size[1], 3, 1, gain, pivot, light[b])


@njit(cache=True, nogil=True, boundscheck=False)
def _frame(image, shape, group, framed):
    """Up to four channels of one picture as pixels of four floats inside the frame."""
    channels, height, width, plane, step = shape
    count = min(channels - group, LANES)
    for y in range(height):
        to = ((y + 1) * (width + FRAME) + 1) * LANES
        line = framed[to : to + width * LANES]
        if count == 3 and step == 1:
            first = group * plane + y * width
            reds, greens, blues = _row(image, first, width), _row(image, first + plane, width), _row(image, first + 2 * plane, width)
            for x in range(width):
                line[4 * x], line[4 * x + 1], line[4 * x + 2], line[4 * x + 3] = reds[x], greens[x], blues[x], np.float32(0)
        else:
            for c in range(count):
                first = (group + c) * plane + y * width * step
                for x in range(width):
                    line[LANES * x + c] = image[first + x * step]


@njit(cache=True, nogil=True, inline="always")
def _row(flat, first, width):
    return flat[first : first + width]


@njit(cache=True, nogil=True, boundscheck=False, error_model="numpy", fastmath=FAST)
def _positions(t, lens, border, row, shape, size, at, fx, fy):
    """For each pixel of an output row: where its upper left neighbour is in the frame, and how far it lies from there."""
    zero = np.float32(0)
    low, last_x, last_y = np.float32(1), np.float32(shape[2] + 1), np.float32(shape[1] + 1)
    if border:
        last_x, last_y = last_x - low, last_y - low
    else:
        low = zero
    y, middle = np.float32(row - (size[0] - 1) * 0.5), np.float32((size[1] - 1) * 0.5)
    u_row, v_row = t[0, 0] + t[0, 2] * y + np.float32(1), t[1, 0] + t[1, 2] * y + np.float32(1)
    across = np.int32(shape[2] + FRAME)
    for column in range(size[1]):
        x = np.float32(column) - middle
        u, v = u_row + t[0, 1] * x, v_row + t[1, 1] * x
        if lens:
            r2 = x * x + y * y
            r4 = r2 * r2
            u += _bend(t[0], x, y, r2, r4)
            v += _bend(t[1], x, y, r2, r4)
        u, v = u if u > low else low, v if v > low else low  # in this order what is not a number becomes `low`
        u, v = u if u < last_x else last_x, v if v < last_y else last_y
        left, top = np.int32(u), np.int32(v)
        at[column] = (top * across + left) * np.int32(LANES)
        fx[column], fy[column] = u - np.float32(left), v - np.float32(top)


@njit(cache=True, nogil=True, inline="always")
def _bend(t, x, y, r2, r4):
    """What a lens adds to one coordinate."""
    return (t[3] * x + t[4] * y) * r2 + (t[5] * x + t[6] * y) * r4 + t[7] * x * x + t[8] * x * y + t[9] * y * y


@njit(cache=True, nogil=True, boundscheck=False)
def _deliver(row, y, group, shape, size, out):
    """One output row from pixels of four floats to the layout of the batch."""
    channels, step = shape[0], shape[4]
    count, width = min(channels - group, LANES), size[1]
    plane = size[0] * width if step == 1 else 1
    if count == 3 and step == 1:
        first = group * plane + y * width
        reds, greens, blues = _row(out, first, width), _row(out, first + plane, width), _row(out, first + 2 * plane, width)
        for x in range(width):
            reds[x], greens[x], blues[x] = row[4 * x], row[4 * x + 1], row[4 * x + 2]
    else:
        for c in range(count):
            first = (group + c) * plane + y * width * step
            for x in range(width):
                out[first + x * step] = row[LANES * x + c]


@njit(cache=True, nogil=True, boundscheck=False, error_model="numpy", fastmath=FAST, inline="always")
def _colour(picture, channels, pixels, step, plane, gain, pivot, light):
    """gain @ colour + pivot * mean grey + light, clamped; `step` from pixel to pixel and `plane` from channel to channel."""
    zero, one = np.float32(0), np.float32(1)
    if channels == 1:
        total = np.float32(0)
        for i in range(pixels):
            total += picture[i]
        g, o = gain[0].sum(), np.float32(pivot[0] * total / pixels + light[0])
        for i in range(pixels):
            picture[i] = min(max(g * picture[i] + o, zero), one)
        return
    red_sum, green_sum, blue_sum = zero, zero, zero
    for i in range(pixels):
        red_sum += picture[i * step]
        green_sum += picture[i * step + plane]
        blue_sum += picture[i * step + 2 * plane]
    mean = (0.299 * red_sum + 0.587 * green_sum + 0.114 * blue_sum) / pixels
    o0, o1, o2 = np.float32(pivot[0] * mean + light[0]), np.float32(pivot[1] * mean + light[1]), np.float32(pivot[2] * mean + light[2])
    g00, g01, g02, g10, g11, g12, g20, g21, g22 = (
        gain[0, 0], gain[0, 1], gain[0, 2], gain[1, 0], gain[1, 1], gain[1, 2], gain[2, 0], gain[2, 1], gain[2, 2],
    )  # fmt: skip
    for i in range(pixels):
        at = i * step
        red, green, blue = picture[at], picture[at + plane], picture[at + 2 * plane]
        picture[at] = min(max(g00 * red + g01 * green + g02 * blue + o0, zero), one)
        picture[at + plane] = min(max(g10 * red + g11 * green + g12 * blue + o1, zero), one)
        picture[at + 2 * plane] = min(max(g20 * red + g21 * green + g22 * blue + o2, zero), one)


def warp_colour(image, u, light, knobs, lens, border, moves, colours, size, threads):
    """Resample `image` (b c h w, float32, contiguous in either layout) and map its colours; the result has the layout of `image`.

    `u` (b n) are the draws of `FusedAugmentation`, `light` (b 3) is added to the colours, and `knobs` are `augment_terms.Knobs`.
    """
    batch, channels, height, width = image.shape
    last = not image.flags.c_contiguous
    flat = (image.transpose(0, 2, 3, 1) if last else image).reshape(batch, -1)
    out = np.empty((batch, channels * size[0] * size[1]), np.float32)
    shape = (channels, height, width, 1 if last else height * width, channels if last else 1)
    arguments = (flat, out, shape, size, u, light, knobs, lens, border, moves, colours)
    threads = min(threads, batch)
    if threads == 1:  # one thread need not wait for the others to wake up
        _share(0, 1, *arguments)
    else:
        threads = use(threads)
        _in_parallel(threads, *arguments)
    return out.reshape(batch, *size, channels).transpose(0, 3, 1, 2) if last else out.reshape(batch, channels, *size)
