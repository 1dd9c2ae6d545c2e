# pyright: reportCallIssue=false, reportOperatorIssue=false
# (numba's intrinsics and its uint32 are not what they look like to a type checker)
"""Float32 in 8 bits with a power of two a block, rounded stochastically: `lightning_cnn.precision._states` for the CPU.

A block with a negative number is e4m3 (sign, 4 exponent bits, 3 of mantissa), another e5m2, whose range suits squares. Both are
`code = (exponent of the spacing - the finest) * 2**mantissa + number of spacings`, with the sign on top.
"""

import numpy as np
from numba import int32, njit, uint8, uint32, uint64

from lightning_cnn.kernels.counter import bits
from lightning_cnn.kernels.rounding import as_float, as_word

BLOCK = 256
NAN = 0x7F


def pack(x: np.ndarray, key: int, index: int, codes: np.ndarray, exponents: np.ndarray, unsigned: np.ndarray) -> None:
    """Round float32 `x`, whose first element is number `index`, into `codes` (blocks, 256), `exponents` and `unsigned` (blocks)."""
    pack_loop(x, np.uint64(key), np.uint64(index & (2**64 - 1)), codes, exponents, unsigned)


@njit(cache=True, nogil=True)
def pack_loop(x, key, index, codes, exponents, unsigned):
    noise, padded = np.empty(BLOCK, np.uint32), np.zeros(BLOCK, np.float32)
    for block in range(codes.shape[0]):
        start = block * BLOCK
        values = x[start : start + BLOCK]
        if values.size < BLOCK:
            for i in range(values.size):
                padded[i] = values[i]
            values = padded
        for i in range(BLOCK):
            noise[i] = bits(key, index + uint64(start + i))
        words = values.view(np.uint32)
        largest, negative = uint32(0), uint32(0)
        for i in range(BLOCK):
            largest = max(largest, uint32(words[i] & uint32(0x7FFFFFFF)))
            negative |= uint32(words[i]) if values[i] < 0 else uint32(0)
        signed = negative != 0
        exponents[block] = _exponent(largest, 7 if signed else 14)
        unsigned[block] = not signed
        if signed:
            _round(values, noise, exponents[block], 3, -9, 0x7E, np.float32(0), codes[block])
        else:
            _round(values, noise, exponents[block], 2, -16, 0x7B, np.float32(2.0**-16), codes[block])


@njit(cache=True, nogil=True)
def _exponent(largest, above):
    # numpy's frexp of the float32 whose word is `largest`, less `above`
    if largest >= uint32(0x7F800000):
        return 0
    exponent = int32(largest >> uint32(23)) - 126 if largest else 0
    return min(max(exponent - above, -120), 120)


@njit(cache=True, nogil=True, inline="always")
def _round(values, noise, exponent, mantissa, finest, limit, smallest, codes):
    scale = as_float(uint32((127 - exponent) << 23))
    below = np.float32(1.0 - 2.0**-24)
    for i in range(BLOCK):
        scaled = abs(values[i]) * scale
        scaled = max(scaled, smallest) if values[i] > 0 else scaled  # no positive second moment becomes zero: steps divide by it
        field = int32(as_word(scaled) >> uint32(23))
        spacing = max(field - int32(mantissa), int32(finest + 127))
        steps = scaled * as_float(uint32(uint32(254 - spacing) << uint32(23)))
        whole = np.floor(steps)
        draw = as_float(uint32(uint32(noise[i] >> uint32(9)) | uint32(0x3F800000))) - below
        count = int32(whole) + (int32(1) if draw < steps - whole else int32(0))
        code = min(int32((spacing - int32(finest + 127)) << int32(mantissa)) + count, int32(limit))
        code = code if field < 255 else int32(NAN)
        codes[i] = uint8(code | (int32(0x80) if values[i] < 0 else int32(0)))


@njit(cache=True, nogil=True)
def unpack(codes, exponents, unsigned, out):
    """The float32 numbers of `codes`, into `out` (flat, as many as it takes)."""
    for block in range(codes.shape[0]):
        scale = as_float(uint32((127 + exponents[block]) << 23))
        place = out[block * BLOCK : block * BLOCK + BLOCK]
        if unsigned[block]:
            _widen(codes[block], 2, -16, 0x7C, scale, place)
        else:
            _widen(codes[block], 3, -9, 0x7F, scale, place)


@njit(cache=True, nogil=True, inline="always")
def _widen(codes, mantissa, finest, beyond, scale, out):
    for i in range(out.size):
        size = int32(codes[i] & uint8(0x7F))
        field = size >> int32(mantissa)
        count = (size & int32((1 << mantissa) - 1)) + (int32(1 << mantissa) if field else int32(0))
        value = np.float32(count) * as_float(uint32((max(field, int32(1)) + int32(126 + finest)) << int32(23))) * scale
        value = np.float32(np.nan) if size >= int32(beyond) else value
        out[i] = -value if codes[i] & uint8(0x80) else value
