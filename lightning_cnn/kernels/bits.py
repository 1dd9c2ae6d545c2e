# pyright: reportCallIssue=false, reportMissingParameterType=false, reportArgumentType=false, reportReturnType=false
# (numba's intrinsics are called without their first parameter)
"""Numbers to bits and sums of bits back to numbers.

A bit is 1 where the number is below zero, so +0.0, -0.0 and NaN count as +1. A word holds 64 channels of a pixel, the last word of a
pixel is filled with zeros.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_cnn.kernels.threads import use

_ADDRESS = ir.IntType(64)


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


class Floats(NamedTuple):
    """Finish with float32 `((dot * affine[0] + affine[1]) * affine[2]) + affine[3]`, a filter."""

    affine: np.ndarray


class Bits(NamedTuple):
    """Finish with bits `(dot < threshold) != flip`, a filter."""

    threshold: np.ndarray
    flip: np.ndarray


@intrinsic
def _eight_below_zero(typingctx, address):
    """Eight bits for eight float32 at `address`."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        floats = ir.VectorType(ir.FloatType(), 8)
        x = b.load(b.inttoptr(arguments[0], ir.PointerType(floats)))
        x.align = 4
        below = b.fcmp_ordered("<", x, ir.Constant(floats, [0.0] * 8))
        return b.zext(b.bitcast(below, ir.IntType(8)), _ADDRESS)

    return types.uint64(types.uintp), build


def _pack_nhwc(x, words):
    """float32 (m, c) to uint64 (m, ceil(c / 64))."""
    rows, channels = x.shape
    for m in prange(rows):
        address = np.uintp(x.ctypes.data) + np.uintp(m * channels * 4)
        for k in range(channels // 64):
            word = np.uint64(0)
            for i in range(8):
                word |= _eight_below_zero(address + np.uintp(256 * k + 32 * i)) << np.uint64(8 * i)
            words[m, k] = word
        if channels % 64:
            word = np.uint64(0)
            for c in range(channels % 64):
                word |= np.uint64(x[m, channels - channels % 64 + c] < np.float32(0)) << np.uint64(c)
            words[m, channels // 64] = word


def _pack_nchw(x, words):
    """float32 (n, c, pixels) to uint64 (n, pixels, ceil(c / 64))."""
    batch, channels, pixels = x.shape
    width = words.shape[2]
    for task in prange(batch * width):
        n, k = task // width, task % width
        block = np.empty(64, np.uint64)
        for start in range(0, pixels, 64):
            count = min(64, pixels - start)
            block[:] = 0
            for c in range(min(64, channels - 64 * k)):
                bit = np.uint64(1) << np.uint64(c)
                row = x[n, 64 * k + c, start : start + count]
                for p in range(count):
                    block[p] |= bit if row[p] < np.float32(0) else np.uint64(0)
            for p in range(count):
                words[n, start + p, k] = block[p]


def both(loop: Any) -> tuple[Any, Any]:
    """The loop for one thread and for several."""
    return tuple(
        njit(loop, parallel=parallel, nogil=True, boundscheck=False, error_model="numpy", cache=True) for parallel in (False, True)
    )  # pyright: ignore[reportReturnType]


_PACK_NHWC, _PACK_NCHW = both(_pack_nhwc), both(_pack_nchw)


def pack(x: np.ndarray, channels_last: bool, threads: int = 1) -> np.ndarray:
    """Words (n, h, w, ceil(c / 64)) of contiguous float32 `x`, (n, h, w, c) or (n, c, h, w)."""
    batch, *size = x.shape
    channels, pixels = (size[-1], size[:-1]) if channels_last else (size[0], size[1:])
    words = np.empty((batch, *pixels, -(-channels // 64)), np.uint64)
    if channels_last:
        chosen(_PACK_NHWC, threads)(x.reshape(-1, channels), words.reshape(-1, words.shape[-1]))
    else:
        chosen(_PACK_NCHW, threads)(x.reshape(batch, channels, -1), words.reshape(batch, -1, words.shape[-1]))
    return words


def chosen(loop: tuple[Any, Any], threads: int) -> Any:
    """The form of a loop for so many threads, which it takes from torch's own pool."""
    return loop[threads > 1 and use(threads) > 1]


@njit(boundscheck=False, nogil=True, error_model="numpy", cache=True)
def taps_inside(position, stride, padding, dilation, taps, size):
    """How many taps of an output position fall inside the input, along one axis."""
    count = 0
    for tap in range(taps):
        count += 0 <= position * stride - padding + tap * dilation < size
    return count


def _affine_of(count: int) -> Any:
    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        sums, total, affine, pitch, out = arguments
        floats = ir.VectorType(ir.FloatType(), count)

        def coefficient(row: int) -> Any:
            return _load(b, b.add(affine, b.mul(pitch, ir.Constant(_ADDRESS, row))), floats)

        dot = b.sitofp(_dots(b, sums, total, count), floats)
        scaled = b.fadd(b.fmul(dot, coefficient(0)), coefficient(1))
        fused = cgutils.get_or_insert_function(b.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fma.v{count}f32")
        b.store(b.call(fused, (scaled, coefficient(2), coefficient(3))), b.inttoptr(out, ir.PointerType(floats))).align = 4
        return context.get_dummy_value()

    return build


@intrinsic
def _sixteen_floats(typingctx, sums, total, affine, pitch, out):
    """Sixteen filters of `finish_floats`, by addresses."""
    return types.void(types.uintp, types.int32, types.uintp, types.uintp, types.uintp), _affine_of(16)


@intrinsic
def _word(typingctx, sums, total, threshold, flip, out):
    """One word of `finish_bits`, by addresses."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        sums, total, threshold, flip, out = arguments
        below = b.icmp_signed("<", _dots(b, sums, total, 64), _load(b, threshold, ir.VectorType(ir.IntType(32), 64)))
        turned = b.load(b.inttoptr(flip, ir.PointerType(_ADDRESS)))
        b.store(b.xor(b.bitcast(below, _ADDRESS), turned), b.inttoptr(out, ir.PointerType(_ADDRESS)))
        return context.get_dummy_value()

    return types.void(types.uintp, types.int32, types.uintp, types.uintp, types.uintp), build


def _load(b: Any, address: Any, kind: Any) -> Any:
    value = b.load(b.inttoptr(address, ir.PointerType(kind)))
    value.align = 4 if kind.element != ir.IntType(16) else 2
    return value


def _dots(b: Any, sums: Any, total: Any, count: int) -> Any:
    """`total - 2 sums` of `count` filters, as int32."""
    wide, zeros = ir.VectorType(ir.IntType(32), count), ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count)
    one = b.insert_element(ir.Constant(wide, ir.Undefined), total, ir.Constant(ir.IntType(32), 0))
    found = b.zext(_load(b, sums, ir.VectorType(ir.IntType(16), count)), wide)
    return b.sub(b.shuffle_vector(one, one, zeros), b.shl(found, ir.Constant(wide, [1] * count)))


@intrinsic
def _one_float(typingctx, sums, total, affine, pitch, out):
    """One filter of `finish_floats`, by addresses."""
    return types.void(types.uintp, types.int32, types.uintp, types.uintp, types.uintp), _affine_of(1)


# The loops below take addresses: making and dropping an array slice a pixel costs more than the arithmetic.
@njit(boundscheck=False, nogil=True, error_model="numpy", cache=True)
def finish_floats(sums, total, affine, pitch, out, count):
    """`out[c] = ((total - 2 sums[c]) * scale + bias) * gain + offset`; the last two are one FMA, as in PyTorch's batch norm.

    Addresses of `count` uint16 and float32; `affine` that of the first filter's scale, `pitch` the bytes from there to its bias.
    """
    for c in range(0, count - 15, 16):
        _sixteen_floats(sums + np.uintp(2 * c), np.int32(total), affine + np.uintp(4 * c), pitch, out + np.uintp(4 * c))
    for c in range(count - count % 16, count):
        _one_float(sums + np.uintp(2 * c), np.int32(total), affine + np.uintp(4 * c), pitch, out + np.uintp(4 * c))


@njit(boundscheck=False, nogil=True, error_model="numpy", cache=True)
def finish_bits(sums, total, threshold, flip, out, count):
    """Bit c is `(total - 2 sums[c] < threshold[c]) != flip[c]`, for `count` words of 64 filters; addresses, as above."""
    for k in range(count):
        _word(sums + np.uintp(128 * k), np.int32(total), threshold + np.uintp(256 * k), flip + np.uintp(8 * k), out + np.uintp(8 * k))


def empty_outputs(shape: tuple[int, int, int, int], finish: Floats | Bits) -> tuple[np.ndarray, np.ndarray]:
    """The float and the bit output of shape (n, h, w, k); the one that is not wanted has no filters."""
    *pixels, filters = shape
    as_floats = isinstance(finish, Floats)
    return (
        np.empty((*pixels, filters if as_floats else 0), np.float32),
        np.empty((*pixels, 0 if as_floats else -(-filters // 64)), np.uint64),
    )


def finish_arrays(finish: Floats | Bits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`affine`, `threshold`, `flip` as the loops take them, the latter two filled to whole words with filters whose bit is 0."""
    if isinstance(finish, Floats):
        return finish.affine, np.empty(0, np.int32), np.empty(0, np.uint64)
    room = -finish.threshold.size % 128
    threshold = np.pad(finish.threshold, (0, room), constant_values=np.iinfo(np.int32).min)
    return np.empty((4, 0), np.float32), threshold, np.packbits(np.pad(finish.flip, (0, room)), bitorder="little").view(np.uint64)
