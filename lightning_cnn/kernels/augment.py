"""Fused augmentation on the CPU: each picture is read once, bent, coloured and clamped while it is in the cache."""

import numpy as np
from numba import get_num_threads, njit, prange, set_num_threads

FAST = {"contract", "nsz", "arcp", "reassoc"}


@njit(cache=True, nogil=True, parallel=True, error_model="numpy", fastmath=FAST)
def _in_parallel(image, terms, lens, border, moves, colours, gain, pivot, light, out):
    for b in prange(len(out)):
        _picture(image[b], terms[b], lens, border, moves, colours, gain[b], pivot[b], light[b], out[b])


@njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST)
def _in_turn(image, terms, lens, border, moves, colours, gain, pivot, light, out):
    for b in range(len(out)):
        _picture(image[b], terms[b], lens, border, moves, colours, gain[b], pivot[b], light[b], out[b])


@njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST)
def _picture(image, terms, lens, border, moves, colours, gain, pivot, light, out):
    if moves:
        for row in range(out.shape[1]):
            _row(image, terms, lens, border, row, out)
    else:
        out[:] = image
    if colours:
        _colour(out.reshape(out.shape[0], out.shape[1] * out.shape[2]), gain, pivot, light)


@njit(cache=True, nogil=True, boundscheck=False, error_model="numpy", fastmath=FAST)
def _row(image, t, lens, border, row, out):
    """One row of the output: bilinear, one pixel after the other, because eight at a time would wait for their gathers."""
    channels, height, width = out.shape
    high, wide = image.shape[1:]
    planes, result = image.reshape(-1), out.reshape(-1)
    zero, one, three = np.float32(0), np.float32(1), channels == 3
    last_x, last_y = np.float32(wide - 1), np.float32(high - 1)
    y, middle = np.float32(row - (height - 1) * 0.5), np.float32((width - 1) * 0.5)
    u_row, v_row = t[0, 0] + t[0, 2] * y, t[1, 0] + t[1, 2] * y
    for column in range(width):
        x = np.float32(column) - middle
        u, v = u_row + t[0, 1] * x, v_row + t[1, 1] * x
        if lens:
            r2 = x * x + y * y
            r4 = r2 * r2
            u += _bend(t[0], x, y, r2, r4)
            v += _bend(t[1], x, y, r2, r4)
        if border:
            u, v = min(max(u, zero), last_x), min(max(v, zero), last_y)
        place = np.uintp(row * width + column)
        if u >= zero and v >= zero and u < last_x and v < last_y:
            left, top = np.int32(u), np.int32(v)
            fx, fy = u - np.float32(left), v - np.float32(top)
            first = np.uintp(top * wide + left)
            south_east = fx * fy
            east, south = fx - south_east, fy - south_east
            stay = one - fx - south
            if three:
                for c in range(3):
                    at = first + np.uintp(c * high * wide)
                    below = at + np.uintp(wide)
                    upper = stay * planes[at] + east * planes[at + np.uintp(1)]
                    lower = south * planes[below] + south_east * planes[below + np.uintp(1)]
                    result[place + np.uintp(c * height * width)] = upper + lower
            else:
                for c in range(channels):
                    _edge_or_inside(image[c], u, v, result, place + np.uintp(c * height * width))
        else:
            for c in range(channels):
                _edge_or_inside(image[c], u, v, result, place + np.uintp(c * height * width))


@njit(cache=True, nogil=True, inline="always")
def _bend(t, x, y, r2, r4):
    """What a lens adds to one coordinate."""
    return (t[3] * x + t[4] * y) * r2 + (t[5] * x + t[6] * y) * r4 + t[7] * x * x + t[8] * x * y + t[9] * y * y


@njit(cache=True, nogil=True, boundscheck=False, error_model="numpy", fastmath=FAST)
def _edge_or_inside(plane, u, v, result, place):
    """Bilinear anywhere: of the four neighbours those outside count as zero."""
    high, wide = plane.shape
    total = np.float32(0)
    if u > -1 and v > -1 and u < wide and v < high:
        left, top = int(np.floor(u)), int(np.floor(v))
        fx, fy = u - np.float32(left), v - np.float32(top)
        for dy in range(2):
            for dx in range(2):
                if 0 <= left + dx < wide and 0 <= top + dy < high:
                    wx = fx if dx else np.float32(1) - fx
                    wy = fy if dy else np.float32(1) - fy
                    total += wx * wy * plane[top + dy, left + dx]
    result[place] = total


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
    arguments = (image, terms, lens, border, moves, colours, gain, pivot, light, out)
    before = get_num_threads()
    if min(threads, before, len(image)) == 1:  # one thread need not wait for the others to wake up
        _in_turn(*arguments)
        return out
    set_num_threads(min(threads, before))
    try:
        _in_parallel(*arguments)
    finally:
        set_num_threads(before)
    return out
