# pyright: reportCallIssue=false, reportMissingParameterType=false, reportArgumentType=false, reportReturnType=false
# (numba's intrinsics are called without their first parameter)
"""Batch norm and max pool in one pass over float32 (n, h, w, c): what lies between the two is never written."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_cnn.kernels.addresses import ADDRESS, both, load, store
from lightning_cnn.kernels.bits import chosen


def _largest_of(count: int) -> Any:
    """The largest `x * gain + offset` (an FMA, as in PyTorch's batch norm) over `rows` by `columns` taps, for `count` channels.

    As PyTorch's pool does it: the first of equals stays, a NaN wins.
    """

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        x, rows, columns, row_pitch, pitch, gain, offset, out = arguments
        floats = ir.VectorType(ir.FloatType(), count)
        fused = cgutils.get_or_insert_function(b.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fma.v{count}f32")
        gains, offsets = load(b, gain, floats, 4), load(b, offset, floats, 4)
        largest = cgutils.alloca_once_value(b, ir.Constant(floats, [float("-inf")] * count))
        no_number = cgutils.alloca_once_value(b, ir.Constant(ir.VectorType(ir.IntType(1), count), [0] * count))
        with cgutils.for_range(b, rows, intp=ADDRESS) as row, cgutils.for_range(b, columns, intp=ADDRESS) as column:
            place = b.add(x, b.add(b.mul(row.index, row_pitch), b.mul(column.index, pitch)))
            value, before = b.call(fused, (load(b, place, floats, 4), gains, offsets)), b.load(largest)
            b.store(b.select(b.fcmp_ordered(">", value, before), value, before), largest)  # one instruction
            b.store(b.or_(b.load(no_number), b.fcmp_unordered("uno", value, value)), no_number)
        store(b, b.select(b.load(no_number), ir.Constant(floats, [float("nan")] * count), b.load(largest)), out, 4)
        return context.get_dummy_value()

    return build


@intrinsic
def _largest_16(typingctx, x, rows, columns, row_pitch, pitch, gain, offset, out):
    return types.void(*[types.intp] * 8), _largest_of(16)


@intrinsic
def _largest_1(typingctx, x, rows, columns, row_pitch, pitch, gain, offset, out):
    return types.void(*[types.intp] * 8), _largest_of(1)


def _pool(x, batch, height, width, channels, affine, out, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w):
    rows, columns = (height + 2 * padding_h - kernel_h) // stride_h + 1, (width + 2 * padding_w - kernel_w) // stride_w + 1
    pitch, offset = 4 * channels, affine + 4 * channels
    for task in prange(batch * rows):
        n, y = task // rows, task % rows
        top, bottom = max(0, y * stride_h - padding_h), min(height, y * stride_h - padding_h + kernel_h)
        for column in range(columns):
            left, right = max(0, column * stride_w - padding_w), min(width, column * stride_w - padding_w + kernel_w)
            place, to = x + ((n * height + top) * width + left) * pitch, out + (task * columns + column) * pitch
            for c in range(0, pitch - 63, 64):
                _largest_16(place + c, bottom - top, right - left, width * pitch, pitch, affine + c, offset + c, to + c)
            for c in range(pitch - pitch % 64, pitch, 4):
                _largest_1(place + c, bottom - top, right - left, width * pitch, pitch, affine + c, offset + c, to + c)


_POOL = both(_pool)


def norm_pool(x: int, size: Sequence[int], affine: int, out: int, window: Sequence[int], threads: int = 1) -> None:
    """Pool `x` of `size` (n, h, w, c) by `window` (kernel, stride, padding, each by height and width); all addresses of float32.

    `affine` is (2, c), gain and offset of the norm.
    """
    chosen(_POOL, threads)(x, *size, affine, out, *window)
