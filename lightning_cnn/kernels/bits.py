# pyright: reportCallIssue=false, reportMissingParameterType=false, reportArgumentType=false, reportReturnType=false
# (numba's intrinsics are called without their first parameter)
"""Numbers to bits and sums of bits back to numbers.

A bit is 1 where the number is below zero, so +0.0, -0.0 and NaN count as +1. A word holds 64 channels of a pixel, the last word of a
pixel is filled with zeros.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_cnn.kernels.addresses import ADDRESS, both, compiled, float_at, load, set_word, store, word_at
from lightning_cnn.kernels.threads import use

WORDS, LAST, FIRST = range(3)  # how pixels lie in memory: uint64 (n, h, w, c / 64), float32 (n, h, w, c), float32 (n, c, h, w)


class Geometry(NamedTuple):
    """A convolution's shape, as the kernels take it."""

    channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int = 1
    stride_w: int = 1
    padding_h: int = 0
    padding_w: int = 0
    dilation_h: int = 1
    dilation_w: int = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """
        >>> Geometry(64, 3, 3, 2, 2, 1, 1).output_size(56, 55)
        (28, 28)
        """
        return (
            (height + 2 * self.padding_h - self.dilation_h * (self.kernel_h - 1) - 1) // self.stride_h + 1,
            (width + 2 * self.padding_w - self.dilation_w * (self.kernel_w - 1) - 1) // self.stride_w + 1,
        )


@intrinsic
def _eight_below_zero(typingctx, address):
    """Eight bits for eight float32 at `address`."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        floats = ir.VectorType(ir.FloatType(), 8)
        below = b.fcmp_ordered("<", load(b, arguments[0], floats, 4), ir.Constant(floats, [0.0] * 8))
        return b.zext(b.bitcast(below, ir.IntType(8)), ADDRESS)

    return types.uint64(types.intp), build


@compiled
def word_of(x, layout, channels, pixel, k):
    """Word `k` of a pixel of `x`, whose layout is WORDS or LAST."""
    if layout == WORDS:
        return word_at(x + 8 * (pixel * ((channels + 63) // 64) + k))
    address = x + 4 * (pixel * channels + 64 * k)
    word = np.uint64(0)
    if channels - 64 * k >= 64:
        for i in range(8):
            word |= _eight_below_zero(address + 32 * i) << np.uint64(8 * i)
    else:
        for c in range(channels - 64 * k):
            word |= np.uint64(float_at(address + 4 * c) < np.float32(0)) << np.uint64(c)
    return word


def _pack_planes(x, batch, channels, pixels, words):
    """float32 (n, c, pixels) to uint64 (n, pixels, ceil(c / 64)), by addresses."""
    width = (channels + 63) // 64
    for task in prange(batch * width):
        n, k = task // width, task % width
        block = np.empty(64, np.uint64)
        for start in range(0, pixels, 64):
            count = min(64, pixels - start)
            block[:] = 0
            for c in range(min(64, channels - 64 * k)):
                bit = np.uint64(1) << np.uint64(c)
                row = x + 4 * ((n * channels + 64 * k + c) * pixels + start)
                for p in range(count):
                    block[p] |= bit if float_at(row + 4 * p) < np.float32(0) else np.uint64(0)
            for p in range(count):
                set_word(words + 8 * ((n * pixels + start + p) * width + k), block[p])


def _pack_pixels(x, batch, channels, pixels, words):
    """float32 (n, pixels, c) to the same."""
    width = (channels + 63) // 64
    for pixel in prange(batch * pixels):
        for k in range(width):
            set_word(words + 8 * (pixel * width + k), word_of(x, LAST, channels, pixel, k))


_PACK_PLANES, _PACK_PIXELS = both(_pack_planes), both(_pack_pixels)


def pack(x: int, layout: int, size: Sequence[int], channels: int, threads: int = 1) -> np.ndarray:
    """Words (n, h, w, ceil(c / 64)) of the float32 numbers at address `x`, of `size` (n, h, w)."""
    words = np.empty((*size, -(-channels // 64)), np.uint64)
    loop = _PACK_PLANES if layout == FIRST else _PACK_PIXELS
    chosen(loop, threads)(x, size[0], channels, size[1] * size[2], words.ctypes.data)
    return words


def chosen(loop: tuple[Any, Any], threads: int) -> Any:
    """The form of a loop for so many threads, which it takes from torch's own pool."""
    return loop[threads > 1 and use(threads) > 1]


@compiled
def taps_inside(position, stride, padding, dilation, taps, size):
    """How many taps of an output position fall inside the input, along one axis."""
    count = 0
    for tap in range(taps):
        count += 0 <= position * stride - padding + tap * dilation < size
    return count


def _affine_of(count: int) -> Any:
    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        sums, total, affine, pitch, plus, out = arguments
        floats = ir.VectorType(ir.FloatType(), count)
        scale, bias, gain, offset = (load(b, b.add(affine, b.mul(pitch, ir.Constant(ADDRESS, row))), floats, 4) for row in range(4))
        scaled = b.fadd(b.fmul(b.sitofp(_dots(b, sums, total, count), floats), scale), bias)
        fused = cgutils.get_or_insert_function(b.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fma.v{count}f32")
        store(b, b.call(fused, (scaled, gain, offset)), out, 4)
        with b.if_then(b.icmp_unsigned("!=", plus, ir.Constant(ADDRESS, 0))):
            store(b, b.fadd(load(b, out, floats, 4), load(b, plus, floats, 4)), out, 4)
        return context.get_dummy_value()

    return build


def _dots(b: Any, sums: Any, total: Any, count: int) -> Any:
    """`total - 2 sums` of `count` filters, as int32."""
    wide, zeros = ir.VectorType(ir.IntType(32), count), ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count)
    one = b.insert_element(ir.Constant(wide, ir.Undefined), total, ir.Constant(ir.IntType(32), 0))
    found = b.zext(load(b, sums, ir.VectorType(ir.IntType(16), count), 2), wide)
    return b.sub(b.shuffle_vector(one, one, zeros), b.shl(found, ir.Constant(wide, [1] * count)))


@intrinsic
def _sixteen_floats(typingctx, sums, total, affine, pitch, plus, out):
    """Sixteen filters of `finish_floats`, by addresses."""
    return types.void(types.intp, types.int32, *[types.intp] * 4), _affine_of(16)


@intrinsic
def _one_float(typingctx, sums, total, affine, pitch, plus, out):
    """One filter of `finish_floats`, by addresses."""
    return types.void(types.intp, types.int32, *[types.intp] * 4), _affine_of(1)


@intrinsic
def _word(typingctx, sums, total, threshold, flip, out):
    """One word of `finish_bits`, by addresses."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        sums, total, threshold, flip, out = arguments
        below = b.icmp_signed("<", _dots(b, sums, total, 64), load(b, threshold, ir.VectorType(ir.IntType(32), 64), 4))
        store(b, b.xor(b.bitcast(below, ADDRESS), load(b, flip, ADDRESS, 4)), out, 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int32, types.intp, types.intp, types.intp), build


@compiled
def finish_floats(sums, total, affine, filters, plus, out, count):
    """`out[c] = ((total - 2 sums[c]) * scale + bias) * gain + offset`; the last two are one FMA, as in PyTorch's batch norm.

    Addresses of `count` uint16 and float32; `affine` that of the first one's scale, in an array (4, filters); `plus` that of what is
    added to the rounded result, or 0.
    """
    step = 4 * min(plus, 1)
    for c in range(0, count - 15, 16):
        _sixteen_floats(sums + 2 * c, np.int32(total), affine + 4 * c, 4 * filters, plus + step * c, out + 4 * c)
    for c in range(count - count % 16, count):
        _one_float(sums + 2 * c, np.int32(total), affine + 4 * c, 4 * filters, plus + step * c, out + 4 * c)


@compiled
def finish_words(sums, total, threshold, flip, out, count):
    """Bit c is `(total - 2 sums[c] < threshold[c]) != flip[c]`, for `count` words of 64 filters; addresses, as above."""
    for k in range(count):
        _word(sums + 128 * k, np.int32(total), threshold + 256 * k, flip + 8 * k, out + 8 * k)


def thresholds(threshold: np.ndarray, flip: np.ndarray) -> np.ndarray:
    """`threshold` and, behind it, `flip` as the kernels read them: int32, both filled to pairs of words with filters whose bit is 0."""
    room = -threshold.size % 128
    bits = np.packbits(np.pad(flip, (0, room)), bitorder="little").view(np.int32)
    return np.concatenate([np.pad(threshold, (0, room), constant_values=np.iinfo(np.int32).min), bits])
