# pyright: reportCallIssue=false, reportMissingParameterType=false, reportArgumentType=false, reportReturnType=false
# (numba's intrinsics are called without their first parameter)
"""Binary convolution of signs, by whatever the processor does fastest.

With AVX2 alone that is table look-ups (`xnor_avx2`); elsewhere XOR and a popcount that the compiler turns into AVX-512 VPOPCNTDQ, NEON
or the scalar instruction.

Source: Rastegari et al. 2016, XNOR-Net, arXiv:1603.05279, section 3.2.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding
from numba import prange, types
from numba.extending import intrinsic

from lightning_cnn.kernels import xnor_avx2, xnor_tile
from lightning_cnn.kernels.addresses import both, compiled, word_at
from lightning_cnn.kernels.bits import FIRST, LAST, WORDS, chosen, finish_floats, finish_words, pack

MAX_PRODUCTS = 65532  # sums are 16-bit words


@cache
def prefers_tables() -> bool:
    """Whether look-ups are the faster way here: AVX2 and no popcount of vectors."""
    has = binding.get_host_cpu_features()
    return bool(has.get("avx2")) and not has.get("avx512vpopcntdq")


def panels(negative: np.ndarray, dilation_w: int = 1, tables: bool | None = None) -> np.ndarray:
    """The weights (k, c, r, s; True where below zero) in the layout that `convolve` reads; `tables` overrides the choice of kernel."""
    if prefers_tables() if tables is None else tables:
        return xnor_tile.panels(negative, dilation_w)
    filters, channels, *taps = negative.shape
    bits = np.zeros((*taps, -(-channels // 64) * 64, filters), np.uint8)
    bits[..., :channels, :] = negative.transpose(2, 3, 1, 0)
    words = np.packbits(bits.reshape(*taps, -1, 64, filters), axis=-2, bitorder="little")
    return np.ascontiguousarray(np.moveaxis(words, -2, -1)).view(np.uint64).reshape(-1, filters)


def convolve(
    x: int, layout: int, size: Sequence[int], panel: int, finish: int, out: int, filters: int, to_words: bool,
    geometry: Sequence[int], threads: int = 1, tables: bool | None = None, plus: int = 0,
) -> None:  # fmt: skip
    """Convolve the signs of `x`, zero-padded, and finish into `out`, (n, h, w, k) float32 or (n, h, w, ceil(k / 64)) words.

    `x` of `size` (n, h, w), `panel` (by `panels`), `finish` (float32 (4, k), or `bits.thresholds`) and `out` are addresses of contiguous
    arrays; floats of the result's shape at `plus` are added to it. Sums are exact; a product is +-1, a padded tap 0.
    """
    tables = prefers_tables() if tables is None else tables
    words = None
    if layout == FIRST or (layout == LAST and not tables):
        words = pack(x, layout, size, geometry[0], threads)
        x, layout = words.ctypes.data, WORDS
    chosen(xnor_avx2.CONVOLVE if tables else _CONVOLVE, threads)(
        x, layout, *size, panel, finish, plus, out, filters, to_words, *geometry
    )


@intrinsic
def _popcount(typingctx, word):
    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.call(b.module.declare_intrinsic("llvm.ctpop", [arguments[0].type]), arguments)

    return types.uint64(types.uint64), build


@compiled
def _count(value, place, found, panel, filters, count):
    """count[k] = mismatches of `found` words with those of filter k, which lie at `place`."""
    count[:] = 0
    for i in range(0, found - 3, 4):
        a, b, c, d = panel + place[i], panel + place[i + 1], panel + place[i + 2], panel + place[i + 3]
        v0, v1, v2, v3 = value[i], value[i + 1], value[i + 2], value[i + 3]
        for k in range(0, 8 * filters, 8):
            four = _popcount(word_at(a + k) ^ v0) + _popcount(word_at(b + k) ^ v1)
            count[k // 8] += four + _popcount(word_at(c + k) ^ v2) + _popcount(word_at(d + k) ^ v3)
    for i in range(found - found % 4, found):
        for k in range(filters):
            count[k] += _popcount(word_at(panel + place[i] + 8 * k) ^ value[i])


def _convolve(
    x, _layout, batch, height, width, panel, finish, plus, out, filters, to_words,
    channels, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
):  # fmt: skip
    rows = (height + 2 * padding_h - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    columns = (width + 2 * padding_w - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
    per_pixel, words = (channels + 63) // 64, (filters + 63) // 64
    for task in prange(batch * rows):
        n, y = task // rows, task % rows
        count, sums = np.empty(filters, np.uint64), np.zeros(filters + 64, np.uint16)
        value, place = np.empty(kernel_h * kernel_w * per_pixel, np.uint64), np.empty(kernel_h * kernel_w * per_pixel, np.int64)
        for column in range(columns):
            found = 0
            for r in range(kernel_h):
                from_y = y * stride_h - padding_h + r * dilation_h
                for s in range(kernel_w):
                    from_x = column * stride_w - padding_w + s * dilation_w
                    if 0 <= from_y < height and 0 <= from_x < width:
                        for k in range(per_pixel):
                            value[found] = word_at(x + 8 * (((n * height + from_y) * width + from_x) * per_pixel + k))
                            place[found] = 8 * filters * ((r * kernel_w + s) * per_pixel + k)
                            found += 1
            _count(value, place, found, panel, filters, count)
            for k in range(filters):
                sums[k] = count[k]
            total, pixel, of_sums = found // per_pixel * channels, (n * rows + y) * columns + column, np.int64(sums.ctypes.data)
            if to_words:
                finish_words(of_sums, total, finish, finish + (filters + 127) // 128 * 512, out + 8 * pixel * words, words)
            else:
                at = 4 * pixel * filters
                finish_floats(of_sums, total, finish, filters, plus + at * min(plus, 1), out + at, filters)


_CONVOLVE = both(_convolve)
