# pyright: reportCallIssue=false, reportMissingParameterType=false, reportArgumentType=false, reportReturnType=false
# (numba's intrinsics are called without their first parameter)
"""Binary convolution of packed numbers, by whatever the processor does fastest.

With AVX2 alone that is table look-ups (`xnor_avx2`); elsewhere XOR and a popcount that the compiler turns into AVX-512 VPOPCNTDQ, NEON
or the scalar instruction.

Source: Rastegari et al. 2016, XNOR-Net, arXiv:1603.05279, section 3.2.
"""

from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding
from numba import prange, types
from numba.extending import intrinsic

from lightning_cnn.kernels import xnor_avx2
from lightning_cnn.kernels.bits import (
    Bits,
    Floats,
    Geometry,
    both,
    chosen,
    empty_outputs,
    finish_arrays,
    finish_bits,
    finish_floats,
)

MAX_PRODUCTS = 65532  # sums are 16-bit words


@cache
def prefers_tables() -> bool:
    """Whether look-ups are the faster way here: AVX2 and no popcount of vectors."""
    has = binding.get_host_cpu_features()
    return bool(has.get("avx2")) and not has.get("avx512vpopcntdq")


def panels(negative: np.ndarray, tables: bool | None = None) -> np.ndarray:
    """The weights (k, c, r, s; True where below zero) in the layout that `convolve` reads; `tables` overrides the choice of kernel."""
    if prefers_tables() if tables is None else tables:
        return xnor_avx2.panels(negative)
    filters, channels, *taps = negative.shape
    bits = np.zeros((*taps, -(-channels // 64) * 64, filters), np.uint8)
    bits[..., :channels, :] = negative.transpose(2, 3, 1, 0)
    words = np.packbits(bits.reshape(*taps, -1, 64, filters), axis=-2, bitorder="little")
    return np.ascontiguousarray(np.moveaxis(words, -2, -1)).view(np.uint64).reshape(-1, filters)


def convolve(
    words: np.ndarray, panel: np.ndarray, filters: int, geometry: Geometry, finish: Floats | Bits, threads: int = 1
) -> np.ndarray:
    """Convolve packed `words` (n, h, w, ceil(c / 64)) by `panels(...)`, zero-padded, and finish into float32 or words.

    The result is (n, h, w, k) float32 or (n, h, w, ceil(k / 64)) uint64. Sums are exact; a product is +-1, a padded tap 0.
    """
    if panel.dtype == np.uint8:
        return xnor_avx2.convolve(words, panel, filters, geometry, finish, threads)
    batch, height, width, _ = words.shape
    size = geometry.output_size(height, width)
    floats, bits = empty_outputs((batch, *size, filters), finish)
    chosen(_CONVOLVE, threads)(words, panel, size, geometry, *finish_arrays(finish), floats, bits)
    return floats if isinstance(finish, Floats) else bits


@intrinsic
def _popcount(typingctx, word):
    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.call(b.module.declare_intrinsic("llvm.ctpop", [arguments[0].type]), arguments)

    return types.uint64(types.uint64), build


def _convolve(words, panel, size, geometry, affine, threshold, flip, floats, bits):
    batch, height, width, per_pixel = words.shape
    rows, columns = size
    filters = panel.shape[1]
    for task in prange(batch * rows):
        n, y = task // rows, task % rows
        count = np.empty(filters, np.uint64)
        sums = np.zeros(filters + 64, np.uint16)
        value, place = np.empty(panel.shape[0] + 3, np.uint64), np.empty(panel.shape[0] + 3, np.int64)
        for x in range(columns):
            found = 0
            for r in range(geometry.kernel_h):
                from_y = y * geometry.stride_h - geometry.padding_h + r * geometry.dilation_h
                for s in range(geometry.kernel_w):
                    from_x = x * geometry.stride_w - geometry.padding_w + s * geometry.dilation_w
                    if 0 <= from_y < height and 0 <= from_x < width:
                        for k in range(per_pixel):
                            value[found] = words[n, from_y, from_x, k]
                            place[found] = (r * geometry.kernel_w + s) * per_pixel + k
                            found += 1
            count[:] = 0
            for i in range(0, found - 3, 4):
                a, b, c, d = panel[place[i]], panel[place[i + 1]], panel[place[i + 2]], panel[place[i + 3]]
                v0, v1, v2, v3 = value[i], value[i + 1], value[i + 2], value[i + 3]
                for k in range(filters):
                    count[k] += _popcount(a[k] ^ v0) + _popcount(b[k] ^ v1) + _popcount(c[k] ^ v2) + _popcount(d[k] ^ v3)
            for i in range(found - found % 4, found):
                a, v0 = panel[place[i]], value[i]
                for k in range(filters):
                    count[k] += _popcount(a[k] ^ v0)
            for k in range(filters):
                sums[k] = count[k]
            total = found // per_pixel * geometry.channels
            of_sums, pixel = np.uintp(sums.ctypes.data), (n * rows + y) * columns + x
            if floats.shape[3]:
                out = np.uintp(floats.ctypes.data) + np.uintp(4 * pixel * filters)
                finish_floats(of_sums, total, np.uintp(affine.ctypes.data), np.uintp(4 * filters), out, filters)
            else:
                out = np.uintp(bits.ctypes.data) + np.uintp(8 * pixel * bits.shape[3])
                finish_bits(of_sums, total, np.uintp(threshold.ctypes.data), np.uintp(flip.ctypes.data), out, bits.shape[3])


_CONVOLVE = both(_convolve)
