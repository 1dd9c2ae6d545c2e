"""`lightning_cnn.functional.counter` for numpy, numba and Triton, bit for bit.

`bits` is a numba scalar function for use inside other kernels and, being compiled, a fast loop; `bits_array` is its numpy form. The
Triton form is imported from `lightning_cnn.kernels.counter_triton`, as Triton exists on Linux alone.
"""

import numpy as np
from llvmlite import ir
from numba import njit, uint32, uint64
from numba.extending import intrinsic

MULTIPLY_1, MULTIPLY_2, GOLDEN32 = 0x7FEB352D, 0x846CA68B, 0x9E3779B9
DERIVED = 0x5851F42D4C957F2D


@intrinsic
def mix(typing_context, value):
    """The mixer on 32-bit integers of the compiler: numba's own uint32 arithmetic widens to 64 bits, which halves the vectors."""

    def build(context, builder, signature, arguments):
        return mix_vector(builder, arguments[0])

    return uint32(uint32), build


def mix_vector(builder, word):
    """The mixer in LLVM instructions, on a 32-bit integer or a vector of them; `bits` is two of it."""

    def constant(value):
        return ir.Constant(word.type, [value] * word.type.count if isinstance(word.type, ir.VectorType) else value)

    for shift, factor in ((16, MULTIPLY_1), (15, MULTIPLY_2)):
        word = builder.mul(builder.xor(word, builder.lshr(word, constant(shift))), constant(factor))
    return builder.xor(word, builder.lshr(word, constant(16)))


@njit(uint32(uint64, uint64), cache=True, nogil=True, inline="always")
def high(key, index):
    """What enters `bits` between its two rounds: the high halves."""
    return uint32(uint32(uint32(index >> uint64(32)) * uint32(GOLDEN32)) + uint32(key >> uint64(32)))


@njit(uint32(uint64, uint64), cache=True, nogil=True, inline="always")
def bits(key, index):
    """32 random bits of one index, for use inside compiled loops."""
    mixed = mix(uint32(uint32(index) + uint32(key)))  # pyright: ignore[reportCallIssue]  (numba passes the context)
    return mix(mixed ^ high(key, index))


@njit(cache=True, nogil=True)
def fill_bits(key, index, out):
    """`bits` of each index (int64) as int32."""
    for i in range(len(index)):
        out[i] = np.int32(bits(np.uint64(key), np.uint64(index[i])))


@njit(cache=True, nogil=True, inline="always")
def uniform(key, index):
    """Float32 in [0, 1) of one index, for use inside compiled loops."""
    return np.float32(bits(key, index) >> uint32(8)) * np.float32(2.0**-24)


def bits_array(key: int, index: np.ndarray) -> np.ndarray:
    """32 random bits an index, as uint32 of the shape of `index` (any integer dtype)."""
    wide = index.astype(np.int64).view(np.uint64)
    low, high = wide.astype(np.uint32), (wide >> np.uint64(32)).astype(np.uint32)
    mixed = _mix_array(low + np.uint32(key & 0xFFFFFFFF))
    with np.errstate(over="ignore"):
        return _mix_array(mixed ^ (high * np.uint32(GOLDEN32) + np.uint32((key >> 32) & 0xFFFFFFFF)))


def uniform_array(key: int, index: np.ndarray) -> np.ndarray:
    """Float32 in [0, 1), a multiple of 2**-24, for each index."""
    return (bits_array(key, index) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def permutation(key: int, n: int) -> np.ndarray:
    """The order of `functional.counter.permutation`, as int64."""
    index = np.arange(n)
    high, low = (bits_array(k, index).astype(np.int64) & 0x7FFFFFFF for k in (key, key ^ DERIVED))
    return np.argsort((high << 31) | low, kind="stable")


def _mix_array(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint32(16))) * np.uint32(MULTIPLY_1)
    value = (value ^ (value >> np.uint32(15))) * np.uint32(MULTIPLY_2)
    return value ^ (value >> np.uint32(16))
