# pyright: reportCallIssue=false, reportMissingParameterType=false, reportArgumentType=false, reportReturnType=false
# (numba's intrinsics are called without their first parameter)
"""Binary convolution by the tiles of `xnor_tile`: signs to table offsets, pixel pairs by blocks of filters, sums to floats or words."""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from lightning_cnn.kernels.addresses import both, compiled, store
from lightning_cnn.kernels.bits import Geometry, finish_floats, finish_words, taps_inside, word_of
from lightning_cnn.kernels.xnor_tile import LANES, LINES, PADDING, STEPS, TABLES, spaced, tile_2, tile_4, vectors_for

_PAIRS = 28  # pixel pairs a task at most: their sums stay in the first-level cache


class _Size(NamedTuple):
    """Of an output image: rows, columns, pairs a row; of the input: rows, columns, the columns that are read, nibbles a pixel."""

    height: int
    width: int
    pairs: int
    from_height: int
    from_width: int
    columns: int
    quads: int


@intrinsic
def _spread(typingctx, word, address):
    """Write 16 times each of the 16 nibbles of `word` as uint16 to `address`."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        bytes_, words = ir.VectorType(ir.IntType(8), 8), ir.VectorType(ir.IntType(16), 8)
        pairs = b.zext(b.bitcast(arguments[0], bytes_), words)
        mask = ir.Constant(words, [0xF0] * 8)
        low, high = b.and_(b.shl(pairs, ir.Constant(words, [4] * 8)), mask), b.and_(pairs, mask)
        order = [i // 2 + 8 * (i % 2) for i in range(16)]
        store(b, b.shuffle_vector(low, high, ir.Constant(ir.VectorType(ir.IntType(32), 16), order)), arguments[1], 2)
        return context.get_dummy_value()

    return types.void(types.uint64, types.intp), build


@compiled
def _expand(x, layout, n, y, g, size, nibbles, row):
    """One row of signs to `row`, the table offsets of pixel pairs `stride_w` columns apart; `nibbles` is room for the row."""
    count, apart = size.columns * size.quads, g.stride_w * size.quads
    for i in range(nibbles.size):
        nibbles[i] = 16 * PADDING
    base = np.int64(nibbles.ctypes.data)
    if 0 <= y < size.from_height:
        for x_at in range(min(size.from_width, size.columns + g.stride_w - g.padding_w)):
            start = (x_at + g.padding_w) * size.quads
            for k in range((g.channels + 63) // 64):
                _spread(
                    word_of(x, layout, g.channels, (n * size.from_height + y) * size.from_width + x_at, k), base + 2 * (start + 16 * k)
                )
            # A last word that is not full has spilled zeros into its neighbour, which comes next, or into the padding.
            if size.quads % 16:
                nibbles[start + size.quads : start + size.quads + 16] = 16 * PADDING
    first, second = nibbles[:count], nibbles[apart : apart + count]
    for i in range(count):
        row[i] = first[i] + second[i] * np.uint16(17)


@compiled
def _offsets(g, size):
    """Bytes from a pixel's first input to the inputs of each triple."""
    steps = spaced(g.channels, g.kernel_w, g.dilation_w)
    runs = 1 if g.dilation_w == 1 else g.kernel_w
    offsets = np.empty(g.kernel_h * runs * steps // 3, np.int64)
    for i in range(offsets.size):
        run, triple = i // (steps // 3), i % (steps // 3)
        r, s = run // runs, run % runs
        offsets[i] = 2 * ((r * g.dilation_h * size.columns + s * g.dilation_w) * size.quads + 3 * triple)
    return offsets


@compiled
def _multiply(inputs, panel, offsets, lanes, g, size, begin, end, sums):
    """Popcounts of the pixel pairs `begin` to `end` of an image with the block of filters `panel`."""
    for i in range(2 * (end - begin) * lanes):  # a loop: numba's slice assignment is slower
        sums[i] = 0
    table, ahead = np.int64(TABLES.ctypes.data), panel + STEPS * lanes
    for step in range(0, 3 * offsets.size, STEPS):
        triples = min(STEPS, 3 * offsets.size - step) // 3
        weights, places = panel + step * lanes, np.int64(offsets.ctypes.data) + step // 3 * 8
        y, x = divmod(begin, size.pairs)
        here = np.int64(sums.ctypes.data)
        for _ in range(begin, end):
            at = inputs + 2 * (y * g.stride_h * size.columns + 2 * x * g.stride_w) * size.quads
            if lanes == 4 * LANES:
                tile_4(table, weights, places, at, triples, here, ahead)
            else:
                tile_2(table, weights, places, at, triples, here, ahead)
            here, ahead = here + 4 * lanes, ahead + 64 * LINES
            x += 1
            if x == size.pairs:
                x, y = 0, y + 1


@compiled
def _finish(sums, first, lanes, g, size, n, begin, end, finish, plus, out, filters, to_words):
    """The sums of `_multiply` into an image of floats (h, w, k) or words (h, w, k / 64)."""
    taps, fill = g.kernel_h * g.kernel_w, 4 * size.quads - g.channels
    words = (filters + 63) // 64
    y, x = divmod(begin, size.pairs)
    x *= 2
    for i in range(2 * (end - begin)):
        if x < size.width:
            total = taps * g.channels
            if fill:  # a padded tap adds 2 a nibble to the sum, and has fewer than 4 channels to answer for
                rows = taps_inside(y, g.stride_h, g.padding_h, g.dilation_h, g.kernel_h, size.from_height)
                columns = taps_inside(x, g.stride_w, g.padding_w, g.dilation_w, g.kernel_w, size.from_width)
                total += (taps - rows * columns) * fill
            row = np.int64(sums.ctypes.data) + 2 * i * lanes
            pixel = (n * size.height + y) * size.width + x
            if to_words:
                flip = finish + (filters + 127) // 128 * 512 + first // 8
                to = out + 8 * (pixel * words + first // 64)
                finish_words(row, total, finish + 4 * first, flip, to, min(lanes // 64, words - first // 64))
            else:
                at = 4 * (pixel * filters + first)
                finish_floats(row, total, finish + 4 * first, filters, plus + at * min(plus, 1), out + at, min(lanes, filters - first))
        x += 1
        if x == 2 * size.pairs:
            x, y = 0, y + 1


@compiled
def _task(task, groups, batch, inputs, panel, offsets, lanes, g, size, finish, plus, out, filters, to_words):
    """A group of pixel pairs of an image by a block of filters. Neighbouring tasks share the filters."""
    block, n, group = task // (batch * groups), task // groups % batch, task % groups
    pairs = size.height * size.pairs
    begin, end = group * pairs // groups, (group + 1) * pairs // groups
    room = np.empty(2 * (end - begin) * lanes + 32, np.uint16)
    skew = (64 - np.int64(room.ctypes.data) % 64) % 64 // 2
    sums = room[skew : skew + 2 * (end - begin) * lanes]
    rows = size.from_height + 2 * g.padding_h
    image = np.int64(inputs.ctypes.data) + 2 * n * rows * size.columns * size.quads
    _multiply(image, panel + block * 3 * offsets.size * lanes, offsets, lanes, g, size, begin, end, sums)
    _finish(sums, block * lanes, lanes, g, size, n, begin, end, finish, plus, out, filters, to_words)


def _convolve(
    x, layout, batch, height, width, panel, finish, plus, out, filters, to_words,
    channels, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
):  # fmt: skip
    g = Geometry(channels, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w)
    out_h = (height + 2 * padding_h - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    out_w = (width + 2 * padding_w - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
    pairs, quads = (out_w + 1) // 2, (channels + 3) // 4
    size = _Size(out_h, out_w, pairs, height, width, (2 * pairs - 2) * stride_w + (kernel_w - 1) * dilation_w + 1, quads)
    rows, count = height + 2 * padding_h, size.columns * quads
    inputs = np.empty(batch * rows * count + 2, np.uint16)
    inputs[inputs.size - 2 :] = 0  # the last triple may look behind the last pixel
    for task in prange(batch * rows):
        nibbles = np.empty(count + stride_w * quads + 16, np.uint16)
        _expand(x, layout, task // rows, task % rows - padding_h, g, size, nibbles, inputs[task * count : (task + 1) * count])
    lanes, offsets = LANES * vectors_for(filters), _offsets(g, size)
    groups = (out_h * pairs + _PAIRS - 1) // _PAIRS
    for task in prange((filters + lanes - 1) // lanes * batch * groups):
        _task(task, groups, batch, inputs, panel, offsets, lanes, g, size, finish, plus, out, filters, to_words)


CONVOLVE = both(_convolve)
