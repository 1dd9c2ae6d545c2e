"""`lightning_cnn.functional.rounding` for the CPU, compiled by numba: the formula's bits, 20 times faster.

Large arrays are cut into one piece a torch thread; the loops release the GIL.
"""
# pyright: reportCallIssue=false, reportOperatorIssue=false
# (numba's intrinsics and its uint32 are not what they look like to a type checker)

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from numba import float32, njit, uint32, uint64
from numba.extending import intrinsic

from lightning_cnn.kernels.counter import bits

BLOCK = 1024  # elements whose noise is drawn at once: 2 KiB, in the L1 cache
PIECE = 1 << 18  # below two of these a thread costs more than it saves


def to_bf16(x: np.ndarray, key: int, index: int, out: np.ndarray, threads: int = 1) -> None:
    """Round float32 `x` to the int16 words of bfloat16 in `out`; x[0] is element `index`."""
    words, target = x.view(np.uint32), out.view(np.uint16)
    _in_pieces(lambda a, b: _to_bf16(words[a:b], np.uint64(key), _unsigned(index + a), target[a:b]), x.size, threads)


def to_spacing(x: np.ndarray, key: int, index: int, limits: tuple, out: np.ndarray, threads: int = 1) -> None:
    """Round float32 `x` to `limits` = (mantissa, finest, coarsest, low, high, saturates_infinity), as float32 in `out`."""
    mantissa, finest, coarsest, low, high, saturates = limits
    exponents = (np.uint32(exponent << 23) for exponent in (mantissa, finest + 127, coarsest + 127))
    fixed = *exponents, np.float32(low), np.float32(high), saturates
    _in_pieces(lambda a, b: _to_spacing(x[a:b], np.uint64(key), _unsigned(index + a), *fixed, out[a:b]), x.size, threads)


def _unsigned(index: int) -> np.uint64:
    return np.uint64(index & (2**64 - 1))


def _in_pieces(work, size: int, threads: int) -> None:
    pieces = min(threads, size // PIECE)
    if pieces < 2:
        work(0, size)
        return
    cuts = [size * piece // pieces for piece in range(pieces + 1)]
    list(_pool(threads).map(work, cuts[:-1], cuts[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@intrinsic
def _as_float(typing_context, word):
    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(float32))

    return float32(uint32), build


@njit(cache=True, nogil=True)
def _to_bf16(x, key, index, out):
    noise = np.empty(BLOCK // 2 + 1, np.uint32)
    halves = noise.view(np.uint16)
    odd = np.int64(index & uint64(1))
    for start in range(0, x.size, BLOCK):
        n = min(BLOCK, x.size - start)
        # an arithmetic shift: the index is a signed number in 64 bits
        first = uint64(np.int64(index + uint64(start)) >> 1)
        for i in range((n + odd + 1) // 2):
            noise[i] = bits(key, first + uint64(i))
        word, result, half = x[start : start + n], out[start : start + n], halves[odd : odd + n]
        for i in range(n):
            size = uint32(word[i] & uint32(0x7FFFFFFF))
            moved = min(uint32(size + uint32(half[i])), uint32(0x7F7FFFFF))
            kept = uint32(size | uint32(0x00400000)) if size > uint32(0x7F800000) else size
            magnitude = moved if size < uint32(0x7F800000) else kept
            result[i] = np.uint16(uint32(magnitude | uint32(word[i] & uint32(0x80000000))) >> uint32(16))


@njit(cache=True, nogil=True)
def _to_spacing(x, key, index, mantissa, finest, coarsest, low, high, saturates_infinity, out):
    words = x.view(np.uint32)
    infinity, below = np.float32(np.inf), np.float32(1.0 - 2.0**-24)
    for i in range(x.size):
        # 23 bits of noise as a float32 in [1, 2), less almost 1: the middle of its 2**-23
        noise = _as_float(uint32(uint32(bits(key, index + uint64(i)) >> uint32(9)) | uint32(0x3F800000))) - below
        exponent = max(uint32(words[i] & uint32(0x7F800000)), uint32(finest + mantissa))
        spacing = min(uint32(exponent - mantissa), coarsest)
        value, size = x[i], abs(x[i])
        steps = size * _as_float(uint32(uint32(254 << 23) - spacing))
        whole = np.floor(steps)
        moved = (whole + (np.float32(1.0) if noise < steps - whole else np.float32(0.0))) * _as_float(spacing)
        moved = np.copysign(moved, value) if steps < np.float32(2.0**23) else value
        clamped = low if moved < low else (high if moved > high else moved)
        out[i] = value if size == infinity and not saturates_infinity else clamped
