"""`lightning_cnn.functional.rounding` for the CPU, compiled by numba: the formula's bits, 20 times faster.

Large arrays are cut into one piece a torch thread; the loops release the GIL.
"""
# pyright: reportCallIssue=false, reportOperatorIssue=false
# (numba's intrinsics and its uint32 are not what they look like to a type checker)

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from llvmlite import ir
from numba import boolean, float32, int64, njit, uint32, uint64, uintp
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_cnn.kernels.counter import bits, mix, mix_vector
from lightning_cnn.kernels.counter import high as high_half

LARGEST_BF16 = 0x7F7FFFFF
LANES = 16  # elements rounded at once, on eight words of noise
BLOCK = 1024  # elements that are rounded again, one by one, where one of them is not finite
HALF, WORD = ir.IntType(16), ir.IntType(32)
PIECE = 1 << 18  # below two of these a thread costs more than it saves


def to_bf16(x: np.ndarray, key: int, index: int, out: np.ndarray, threads: int = 1) -> None:
    """Round float32 `x` to the int16 words of bfloat16 in `out`; x[0] is element `index`."""
    words, target = x.view(np.uint32), out.view(np.uint16)
    in_pieces(lambda a, b: to_bf16_loop(words[a:b], np.uint64(key), unsigned_64(index + a), target[a:b]), x.size, threads)


def to_spacing(x: np.ndarray, key: int, index: int, limits: tuple, out: np.ndarray, threads: int = 1) -> None:
    """Round float32 `x` to `limits` = (mantissa, finest, coarsest, low, high, saturates_infinity), as float32 in `out`."""
    mantissa, finest, coarsest, low, high, saturates = limits
    exponents = (np.uint32(exponent << 23) for exponent in (mantissa, finest + 127, coarsest + 127))
    fixed = *exponents, np.float32(low), np.float32(high), saturates
    in_pieces(lambda a, b: _to_spacing(x[a:b], np.uint64(key), unsigned_64(index + a), *fixed, out[a:b]), x.size, threads)


def unsigned_64(index: int) -> np.uint64:
    return np.uint64(index & (2**64 - 1))


def in_pieces(work: Callable[[int, int], object], size: int, threads: int, unit: int = 1) -> None:
    """Call `work(begin, end)` for a piece of the elements a thread, cut at multiples of `unit`."""
    pieces = min(threads, size // PIECE)
    if pieces < 2:
        work(0, size)
        return
    cuts = [size * piece // pieces // unit * unit for piece in range(pieces)] + [size]
    list(_pool(threads).map(work, cuts[:-1], cuts[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@intrinsic
def as_float(typing_context, word):
    """The float32 of a word."""

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(float32))

    return float32(uint32), build


@intrinsic
def as_word(typing_context, number):
    """The word of a float32."""

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], WORD)

    return uint32(float32), build


@njit(cache=True, nogil=True)
def to_bf16_loop(x, key, index, out):
    start = min(np.int64(index & uint64(1)), x.size)  # two neighbours share a word of noise: begin at the first of a pair
    _any_to_bf16(x[:start], key, index, out[:start])
    while start < x.size:
        n = min(BLOCK, x.size - start)
        first = _pair(index + uint64(start))
        whole = n // LANES * LANES if uint32(first) < uint32(0xFFFFFFFF - BLOCK) else 0  # the high half of the counter is a constant
        if whole and not _finite_to_bf16(
            np.uintp(x[start:].ctypes.data),
            np.uintp(out[start:].ctypes.data),
            whole // LANES,
            uint32(uint32(first) + uint32(key)),
            high_half(key, first),
        ):
            whole = 0
        _any_to_bf16(x[start + whole : start + n], key, index + uint64(start + whole), out[start + whole : start + n])
        start += n


@intrinsic
def _finite_to_bf16(typing_context, words, out, groups, counter, key_high):
    """Round `groups` of `LANES` float32 at the address `words`; False (and nothing of use written) where one is not finite or nearly so.

    `counter` is the mixer's first word, `key_high` what enters between its rounds. In registers: numba's own loop over the same
    arithmetic goes through memory twice and takes twice as long.
    """

    def build(context, builder, signature, arguments):
        source, target, count, first, second = arguments
        wide, half = ir.VectorType(WORD, LANES), ir.VectorType(HALF, LANES)
        counters, second = first_counters(builder, first), spread(builder, second, LANES // 2)
        largest = cgutils.alloca_once_value(builder, constant(wide, 0))
        with cgutils.for_range(builder, count, intp=count.type) as loop:
            noise = draw(builder, counters, loop.index, second)
            word = builder.load(element(builder, source, loop.index, 4, wide), align=4)
            size, seen = builder.and_(word, constant(wide, 0x7FFFFFFF)), builder.load(largest)
            builder.store(builder.select(builder.icmp_unsigned(">", size, seen), size, seen), largest)
            rounded = builder.trunc(builder.lshr(builder.add(word, noise), constant(wide, 16)), half)
            builder.store(rounded, element(builder, target, loop.index, 2, half), align=2)
        reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(WORD, [wide]), f"llvm.vector.reduce.umax.v{LANES}i32")
        return builder.icmp_unsigned("<", builder.call(reduce, [builder.load(largest)]), ir.Constant(WORD, LARGEST_BF16 & 0xFFFF0000))

    return boolean(uintp, uintp, int64, uint32, uint32), build


# For kernels that write LLVM instructions: `LANES` elements at a time, the group `index` of which begins at a pair.


def first_counters(builder, counter):
    """What enters the mixer for the first group, from the `counter` of its first pair."""
    return builder.add(spread(builder, counter, LANES // 2), ir.Constant(ir.VectorType(WORD, LANES // 2), list(range(LANES // 2))))


def draw(builder, counters, index, key_high):
    """16 bits of noise an element of group `index`, as a vector of words."""
    step = builder.trunc(builder.mul(index, ir.Constant(index.type, LANES // 2)), WORD)
    mixed = mix_vector(builder, builder.add(counters, spread(builder, step, LANES // 2)))
    noise = mix_vector(builder, builder.xor(mixed, key_high))
    return builder.zext(builder.bitcast(noise, ir.VectorType(HALF, LANES)), ir.VectorType(WORD, LANES))


def round_words(builder, word, noise):
    """The words of bfloat16 for those of results of arithmetic, whose NaNs are quiet; otherwise `functional.rounding._formula_bf16`.

    What would be carried beyond the largest number, infinity and NaN get no noise: then their upper halves are right as they are.
    """
    wide = word.type
    far = builder.icmp_unsigned(">", builder.and_(word, constant(wide, 0x7FFFFFFF)), constant(wide, LARGEST_BF16 & 0xFFFF0000))
    moved = builder.add(word, builder.select(far, constant(wide, 0), noise))
    return builder.trunc(builder.lshr(moved, constant(wide, 16)), ir.VectorType(HALF, LANES))


def spread(builder, value, lanes):
    """A vector of one value."""
    kind = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(WORD, 0))
    return builder.shuffle_vector(one, one, constant(ir.VectorType(WORD, lanes), 0))


def constant(kind, value):
    """A vector of one constant."""
    return ir.Constant(kind, [value] * kind.count)


def element(builder, address, index, size, kind):
    """Where group `index` of elements of `size` bytes begins."""
    return builder.inttoptr(builder.add(address, builder.mul(index, ir.Constant(index.type, size * LANES))), kind.as_pointer())


@njit(cache=True, nogil=True)
def _any_to_bf16(x, key, index, out):
    for i in range(x.size):
        element = index + uint64(i)
        noise = uint32(bits(key, _pair(element)) >> uint32(uint32(element & uint64(1)) * uint32(16))) & uint32(0xFFFF)
        size = uint32(x[i] & uint32(0x7FFFFFFF))
        moved = min(uint32(size + noise), uint32(LARGEST_BF16))
        kept = uint32(size | uint32(0x00400000)) if size > uint32(0x7F800000) else size
        magnitude = moved if size < uint32(0x7F800000) else kept
        out[i] = np.uint16(uint32(magnitude | uint32(x[i] & uint32(0x80000000))) >> uint32(16))


@njit(cache=True, nogil=True)
def _pair(element):
    return uint64(np.int64(element) >> 1)  # an arithmetic shift: the index is a signed number in 64 bits


@njit(cache=True, nogil=True)
def _to_spacing(x, key, index, mantissa, finest, coarsest, low, high, saturates_infinity, out):
    limits = (mantissa, finest, coarsest, low, high, saturates_infinity)
    held = np.empty(BLOCK, np.float32)  # read from here, the loop is vectorised even where `out` is `x` itself
    start = 0
    while start < x.size:
        first = index + uint64(start)
        n = min(x.size - start, BLOCK, 2**32 - np.int64(uint32(first)))  # the high half of the counter is a constant
        held[:n] = x[start : start + n]
        _block_to_spacing(held[:n], uint32(uint32(first) + uint32(key)), high_half(key, first), limits, out[start : start + n])
        start += n


@njit(cache=True, nogil=True)
def _block_to_spacing(x, counter, key_high, limits, out):
    mantissa, finest, coarsest, low, high, saturates_infinity = limits
    words = x.view(np.uint32)
    infinity, below = np.float32(np.inf), np.float32(1.0 - 2.0**-24)
    for i in range(x.size):
        # 23 bits of noise as a float32 in [1, 2), less almost 1: the middle of its 2**-23
        word = mix(mix(uint32(counter + uint32(i))) ^ key_high)
        noise = as_float(uint32(uint32(word >> uint32(9)) | uint32(0x3F800000))) - below
        exponent = max(uint32(words[i] & uint32(0x7F800000)), uint32(finest + mantissa))
        spacing = min(uint32(exponent - mantissa), coarsest)
        value, size = x[i], abs(x[i])
        steps = size * as_float(uint32(uint32(254 << 23) - spacing))
        whole = np.floor(steps)
        moved = (whole + (np.float32(1.0) if noise < steps - whole else np.float32(0.0))) * as_float(spacing)
        moved = np.copysign(moved, value) if steps < np.float32(2.0**23) else value
        clamped = low if moved < low else (high if moved > high else moved)
        out[i] = value if size == infinity and not saturates_infinity else clamped
