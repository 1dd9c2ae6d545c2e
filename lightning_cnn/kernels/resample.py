"""Crop, scale, flip, normalise and lay out stored pictures in one pass over memory (numba, GIL-free).

Pictures are bytes (h w 3) inside one flat array; batch entry b reads its own at `offset[b]`, `width[b]` pixels to the row, and
is written to `out[entry[b]]`, so that threads and files share a batch. Outputs are (b y x 3): torch's channels_last.

`crop_resize` scales horizontally first and keeps the scaled rows it needs next, so each source row is converted and scaled once; the
vertical pass and the normalisation are then one run over contiguous floats. Its weights are those of torch's antialiased bilinear
`interpolate`, and it rounds nowhere in between.
"""

import math

import numpy as np
from numba import njit

from lightning_cnn.kernels.checksum import wrong
from lightning_cnn.kernels.counter import uniform
from lightning_cnn.kernels.pixel import fence, mix, stream_scaled

_mix2, _mix3, _mix4, _mix8 = mix(2), mix(3), mix(4), mix(8)
WIDEST = 8
TRIES = 10
DRAWS = 32  # numbers set aside for one sample: two a try, two for the place, one for the flip


@njit(cache=True, nogil=True)
def random_resized_boxes(key, index, height, width, area, log_ratio, box):
    """Fill `box` (b 4: top, left, height, width) as torchvision's RandomResizedCrop draws it, from (key, sample index)."""
    for b in range(len(index)):
        first = index[b] * DRAWS
        h, w = height[b], width[b]
        box[b, 0], box[b, 1], box[b, 2], box[b, 3] = _central_box(h, w, math.exp(log_ratio[0]), math.exp(log_ratio[1]))
        for t in range(TRIES):
            target = h * w * (area[0] + uniform(key, first + 2 * t) * (area[1] - area[0]))
            ratio = math.exp(log_ratio[0] + uniform(key, first + 2 * t + 1) * (log_ratio[1] - log_ratio[0]))
            bh, bw = round(math.sqrt(target / ratio)), round(math.sqrt(target * ratio))
            if 0 < bh <= h and 0 < bw <= w:
                box[b, 0] = int(uniform(key, first + 2 * TRIES) * (h - bh + 1))
                box[b, 1] = int(uniform(key, first + 2 * TRIES + 1) * (w - bw + 1))
                box[b, 2], box[b, 3] = bh, bw
                break


@njit(cache=True, nogil=True, inline="always")
def _central_box(h, w, low, high):
    bh, bw = h, w
    if w < low * h:
        bh = round(w / low)
    elif w > high * h:
        bw = round(h * high)
    return (h - bh) // 2, (w - bw) // 2, bh, bw


@njit(cache=True, nogil=True)
def random_places(key, index, height, width, size, padding, box):
    """Fill `box` with a square of `size` somewhere in each picture padded by `padding` (coordinates of the unpadded picture)."""
    for b in range(len(index)):
        first = index[b] * DRAWS + 2 * TRIES
        box[b, 0] = int(uniform(key, first) * (height[b] + 2 * padding - size + 1)) - padding
        box[b, 1] = int(uniform(key, first + 1) * (width[b] + 2 * padding - size + 1)) - padding
        box[b, 2] = box[b, 3] = size


@njit(cache=True, nogil=True)
def random_flips(key, index, probability, flip):
    for b in range(len(index)):
        flip[b] = uniform(key, index[b] * DRAWS + 2 * TRIES + 2) < probability


@njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")
def _taps(n, size, mirrored, start, weight):
    """torch's antialiased bilinear weights from n to `size` pixels; returns how many source pixels an output pixel reads."""
    scale = np.float32(n) / np.float32(size)
    support = max(scale, np.float32(1))
    half = np.float32(0.5)
    taps = 1
    for j in range(size):
        center = scale * (np.float32(j) + half)
        taps = max(taps, min(int(center + support + half), n) - max(int(center - support + half), 0))
    for j in range(size):
        center = scale * (np.float32(j) + half)
        low, high = max(int(center - support + half), 0), min(int(center + support + half), n)
        to = size - 1 - j if mirrored else j
        first = max(min(low, n - taps), 0)
        total = np.float32(0)
        for k in range(taps):
            w = np.float32(0)
            if low <= first + k < high:
                w = max(np.float32(0), np.float32(1) - abs((np.float32(first + k) - center + half) / support))
            weight[k, to] = w
            total += w
        for k in range(taps):
            weight[k, to] /= total
        start[to] = first
    weight[taps:] = 0
    return taps


@njit(cache=True, nogil=True, boundscheck=False, fastmath=True, error_model="numpy")
def _scale_row(source, start_byte, n, row, first, weight, taps, size, out):
    """One source row as floats, scaled to `size` pixels: out[3 * j + c]; writes one float beyond the last pixel."""
    line = source[start_byte : start_byte + 3 * n]
    for k in range(3 * n):
        row[k] = np.float32(line[k])
    if taps <= 2:
        for j in range(size):
            _mix2(row, 3 * first[j], weight, j, out, 3 * j)
    elif taps <= 3:
        for j in range(size):
            _mix3(row, 3 * first[j], weight, j, out, 3 * j)
    elif taps <= 4:
        for j in range(size):
            _mix4(row, 3 * first[j], weight, j, out, 3 * j)
    elif taps <= 8:
        for j in range(size):
            _mix8(row, 3 * first[j], weight, j, out, 3 * j)
    else:
        for j in range(size):
            for c in range(3):
                total = np.float32(0)
                for t in range(taps):
                    total += weight[t, j] * row[3 * (first[j] + t) + c]
                out[3 * j + c] = total


@njit(cache=True, nogil=True, boundscheck=False, fastmath=True, error_model="numpy")
def _blend_rows(ring, first, last, weight, y, blend):
    """Mix the scaled rows first..last-1 into one output row."""
    rows = len(ring)
    r0, w0 = ring[first % rows], weight[0, y]
    if last - first == 2:
        r1, w1 = ring[(first + 1) % rows], weight[1, y]
        for k in range(len(blend)):
            blend[k] = w0 * r0[k] + w1 * r1[k]
    else:
        for k in range(len(blend)):
            blend[k] = w0 * r0[k]
        for t in range(1, last - first):
            r, w = ring[(first + t) % rows], weight[t, y]
            for k in range(len(blend)):
                blend[k] += w * r[k]


@njit(cache=True, nogil=True)
def _channel_pattern(value, size):
    pattern = np.empty(3 * size, np.float32)
    for k in range(3 * size):
        pattern[k] = value[k % 3]
    return pattern


@njit(cache=True, nogil=True)
def _most_taps(lengths, size):
    """Enough for `_taps`, and no fewer than the widest unrolled sum reads."""
    return max(int(2 * max(lengths.max() / size, 1.0)) + 3, WIDEST)


@njit(cache=True, nogil=True, boundscheck=False, fastmath=True, error_model="numpy")
def crop_resize(source, offset, width, box, flip, scale, bias, out, entry, check):
    """out[entry[b], y, x, c] = antialiased resize of the box of picture b, flipped if asked, times scale[c] plus bias[c].

    Whole numbers are cut, not rounded: for uint8 give a bias of 0.5. Returns the first picture whose bytes are wrong, else -1.
    """
    size = out.shape[1]
    rows, columns = _most_taps(box[:, 2], size), _most_taps(box[:, 3], size)
    row, blend = np.zeros(3 * (box[:, 3].max() + columns) + 4, np.float32), np.empty(3 * size, np.float32)
    ring = np.empty((rows, 3 * size + 4), np.float32)
    xs, ys = np.empty(size, np.int64), np.empty(size, np.int64)
    wx, wy = np.zeros((columns, size), np.float32), np.zeros((rows, size), np.float32)
    gain, shift = _channel_pattern(scale, size), _channel_pattern(bias, size)
    streamed = out.itemsize == 4 and size % 8 == 0 and out.ctypes.data % 32 == 0
    for b in range(len(offset)):
        if wrong(source, offset, check, b):
            return b
        top, left, bh, bw = box[b, 0], box[b, 1], box[b, 2], box[b, 3]
        taps_x, taps_y = _taps(bw, size, flip[b], xs, wx), _taps(bh, size, False, ys, wy)
        row[3 * bw :] = 0
        ready = 0
        for y in range(size):
            first = ys[y]
            last = min(first + taps_y, bh)
            ready = max(ready, first)
            while ready < last:
                begin = offset[b] + 3 * ((top + ready) * width[b] + left)
                _scale_row(source, begin, bw, row, xs, wx, taps_x, size, ring[ready % rows])
                ready += 1
            _blend_rows(ring, first, last, wy, y, blend)
            target = out[entry[b], y].reshape(3 * size)
            if streamed:
                for k in range(0, 3 * size, 8):
                    stream_scaled(blend, gain, shift, target, k)
            else:
                _deliver(blend, gain, shift, target)
    fence()
    return -1


@njit(cache=True, nogil=True, boundscheck=False, fastmath=True, error_model="numpy")
def crop_padded(source, offset, height, width, box, flip, scale, bias, out, entry, check):
    """As `crop_resize` without resizing: `box` has the size of the output and may reach beyond the picture, where it is black.

    For small pictures, whose batches stay in the last cache until the network reads them: nothing is written past it.
    """
    size = out.shape[1]
    gain, shift = _channel_pattern(scale, size), _channel_pattern(bias, size)
    black, row = np.zeros(3 * size, np.float32), np.empty(3 * size, np.float32)
    for b in range(len(offset)):
        if wrong(source, offset, check, b):
            return b
        top, left = box[b, 0], box[b, 1]
        low, high = max(0, -left), min(size, width[b] - left)
        row[:] = 0
        for y in range(size):
            target = out[entry[b], y].reshape(3 * size)
            if not (0 <= top + y < height[b] and low < high):
                _deliver(black, gain, shift, target)
                continue
            begin = offset[b] + 3 * ((top + y) * width[b] + left + low)
            line = source[begin : begin + 3 * (high - low)]
            if flip[b]:
                for x in range(high - low):
                    place = 3 * (size - 1 - low - x)
                    for c in range(3):
                        row[place + c] = line[3 * x + c]
            else:
                for k in range(3 * (high - low)):
                    row[3 * low + k] = line[k]
            _deliver(row, gain, shift, target)
    return -1


@njit(cache=True, nogil=True, boundscheck=False, fastmath=True, forceinline=True)
def _deliver(row, gain, shift, target):
    for k in range(len(row)):
        target[k] = row[k] * gain[k] + shift[k]


@njit(cache=True, nogil=True, boundscheck=False)
def gather(source, offset, out, entry, check):
    """Copy stored pictures of one size into a batch (b n); returns as `crop_resize`."""
    for b in range(len(offset)):
        if wrong(source, offset, check, b):
            return b
        row, stored = out[entry[b]], source[offset[b] : offset[b] + out.shape[1]]
        for i in range(len(row)):  # numba's own slice assignment does not reach the memory's speed
            row[i] = stored[i]
    return -1
