"""xxh3-64 of bytes inside compiled code, so that a sample is checked while it is in the cache for its use (numba, GIL-free).

Equal to the xxhash library's for more than `SHORT` bytes; for fewer xxh3 is other functions, which nobody needs here.

Source: Collet, the XXH3 specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md).
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

SHORT = 240
STRIPE, STRIPES = 64, 16
BLOCK = STRIPE * STRIPES
PRIMES_32 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
PRIMES_64 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
START = np.array(
    [PRIMES_32[2], PRIMES_64[0], PRIMES_64[1], PRIMES_64[2], PRIMES_64[3], PRIMES_32[1], PRIMES_64[4], PRIMES_32[0]], np.uint64
)
SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
        "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364ea"
        "c5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    np.uint8,
)[:192]
FOUR, WORD = ir.VectorType(ir.IntType(64), 4), ir.IntType(64)


def _mix_block(typing_context, sums, data, position, secret):
    """Mix sixteen stripes of `data` into the eight `sums`, and scramble these."""

    def generate(context, builder, signature, arguments):
        totals, source, key = (context.make_array(signature.args[k])(context, builder, arguments[k]).data for k in (0, 1, 3))
        values = [_load(builder, totals, _number(4 * half), 8) for half in range(2)]
        for stripe in range(STRIPES):
            values = _stripe(builder, values, source, _after(builder, arguments[2], STRIPE * stripe), key, _number(8 * stripe))
        for half in range(2):
            value = builder.xor(values[half], builder.lshr(values[half], _all(47)))
            value = builder.xor(value, _load(builder, key, _number(128 + 32 * half)))
            builder.store(builder.mul(value, _all(PRIMES_32[0])), _at(builder, totals, _number(4 * half)), align=8)
        return context.get_dummy_value()

    return types.void(sums, data, types.int64, secret), generate


def _mix_stripe(typing_context, sums, data, position, secret, start):
    """Mix one stripe of `data` into the eight `sums`."""

    def generate(context, builder, signature, arguments):
        totals, source, key = (context.make_array(signature.args[k])(context, builder, arguments[k]).data for k in (0, 1, 3))
        values = [_load(builder, totals, _number(4 * half), 8) for half in range(2)]
        for half, value in enumerate(_stripe(builder, values, source, arguments[2], key, arguments[4])):
            builder.store(value, _at(builder, totals, _number(4 * half)), align=8)
        return context.get_dummy_value()

    return types.void(sums, data, types.int64, secret, types.int64), generate


def _stripe(builder, values, source, position, key, start):
    mixed = []
    for half in range(2):
        word = _load(builder, source, _after(builder, position, 32 * half))
        keyed = builder.xor(word, _load(builder, key, _after(builder, start, 32 * half)))
        product = builder.mul(builder.and_(keyed, _all(0xFFFFFFFF)), builder.lshr(keyed, _all(32)))
        swapped = builder.shuffle_vector(word, word, ir.Constant(ir.VectorType(ir.IntType(32), 4), [1, 0, 3, 2]))
        mixed.append(builder.add(values[half], builder.add(swapped, product)))
    return mixed


def _load(builder, pointer, index, align=1):
    return builder.load(_at(builder, pointer, index), align=align)


def _after(builder, position, distance):
    return builder.add(position, _number(distance))


def _at(builder, pointer, index):
    return builder.bitcast(builder.gep(pointer, [index]), FOUR.as_pointer())


def _number(value):
    return ir.Constant(WORD, value)


def _all(value):
    return ir.Constant(FOUR, [value] * 4)


mix_block: Any = intrinsic(_mix_block)
mix_stripe: Any = intrinsic(_mix_stripe)


@njit(cache=True, nogil=True, boundscheck=False)
def xxh3(data):
    """xxh3-64 of more than `SHORT` bytes."""
    n, sums = len(data), START.copy()
    done = 0
    while done + BLOCK < n:
        mix_block(sums, data, done, SECRET)
        done += BLOCK
    for stripe in range((n - 1 - done) // STRIPE):
        mix_stripe(sums, data, done + STRIPE * stripe, SECRET, 8 * stripe)
    mix_stripe(sums, data, n - STRIPE, SECRET, len(SECRET) - STRIPE - 7)
    total = np.uint64(n) * np.uint64(PRIMES_64[0])
    for k in range(4):
        total += _folded(sums[2 * k] ^ _word(SECRET, 11 + 16 * k), sums[2 * k + 1] ^ _word(SECRET, 19 + 16 * k))
    total = (total ^ total >> np.uint64(37)) * np.uint64(0x165667919E3779F9)
    return total ^ total >> np.uint64(32)


@njit(cache=True, nogil=True, boundscheck=False)
def wrong(source, offset, check, b):
    """Whether piece b differs from its checksum; `check` is (lengths, checksums, which to look at)."""
    length, expected, asked = check
    return asked[b] and xxh3(source[offset[b] : offset[b] + length[b]]) != expected[b]


@njit(cache=True, nogil=True)
def first_wrong(source, offset, check):
    for b in range(len(offset)):
        if wrong(source, offset, check, b):
            return b
    return -1


@njit(cache=True, nogil=True, boundscheck=False)
def _word(data, position):
    value = np.uint64(0)
    for k in range(8):
        value |= np.uint64(data[position + k]) << np.uint64(8 * k)
    return value


@njit(cache=True, nogil=True)
def _folded(a, b):
    """The halves of the 128-bit product, one over the other."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    low_product, cross = a0 * b0, a1 * b0
    middle = (low_product >> half) + (cross & low) + a0 * b1
    high = (cross >> half) + (middle >> half) + a1 * b1
    return high ^ (middle << half | low_product & low)
