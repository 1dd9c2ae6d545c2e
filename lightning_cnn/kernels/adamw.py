# pyright: reportCallIssue=false, reportOperatorIssue=false
# (numba's intrinsics and its uint32 are not what they look like to a type checker)
"""One step of Adam or AdamW on bfloat16 weights in a single pass over memory, everything rounded stochastically.

A block of weights, gradients and moments is widened into the first-level cache, stepped in float32 and rounded back, each with the
noise that `functional.rounding.round_stochastic` would have drawn for it.

Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; the order of operations is torch.optim's.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import int64, njit, types, uint32, uint64
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_cnn.kernels import eight_bits
from lightning_cnn.kernels.counter import high
from lightning_cnn.kernels.rounding import (
    HALF,
    LANES,
    WORD,
    as_float,
    constant,
    draw,
    element,
    first_counters,
    in_pieces,
    round_words,
    spread,
    to_bf16_loop,
)

EIGHT = eight_bits.BLOCK
BLOCK = 1024  # four float32 buffers of it fill half of a first-level cache
_widen_8bit, _pack_8bit = eight_bits.unpack, eight_bits.pack_loop


class Moment(NamedTuple):
    """A moment as it is stored: the field in use is not empty. Bfloat16 is its uint16 words."""

    wide: np.ndarray
    half: np.ndarray
    codes: np.ndarray
    exponents: np.ndarray
    unsigned: np.ndarray
    key: np.uint64


class Rule(NamedTuple):
    """A step's numbers, in float32."""

    shrink: np.float32  # 1 - lr * weight decay, or 1
    pull: np.float32  # the weight decay of Adam, which is added to the gradient, or 0
    sign: np.float32  # -1 to maximize
    keep_mean: np.float32  # 1 - beta1
    keep_square: np.float32  # beta2
    new_square: np.float32  # 1 - beta2
    rate: np.float32  # lr / (1 - beta1 ** step)
    square_rate: np.float32  # 1 / sqrt(1 - beta2 ** step)
    eps: np.float32


def step(weight: np.ndarray, gradient: np.ndarray, mean: Moment, square: Moment, key: int, rule: Rule, threads: int = 1) -> None:
    """Step flat `weight` by `gradient`, both the uint16 words of bfloat16, and both moments, in place."""
    in_pieces(lambda a, b: _step(weight, gradient, mean, square, np.uint64(key), rule, a, b), weight.size, threads, BLOCK)


@njit(cache=True, nogil=True, error_model="numpy")
def _step(weight, gradient, mean, square, key, rule, begin, end):
    w, g, m, v = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for start in range(begin, end, BLOCK):
        n = min(BLOCK, end - start)
        if n == BLOCK and not mean.codes.size:
            pair = uint64(start // 2)
            streams = (*_counters(key, pair), *_counters(mean.key, pair), *_counters(square.key, pair))
            of_weight, of_gradient = _address(weight, start), _address(gradient, start)
            if mean.wide.size:
                places = (of_weight, of_gradient, _address(mean.wide, start), _address(square.wide, start))
                _wide_moments(BLOCK // LANES, places, streams, rule)
            else:
                places = (of_weight, of_gradient, _address(mean.half, start), _address(square.half, start))
                _half_moments(BLOCK // LANES, places, streams, rule)
            continue
        _load_half(weight[start : start + n], w)
        _load_half(gradient[start : start + n], g)
        _load(mean, start, n, m)
        _load(square, start, n, v)
        _update(w[:n], g[:n], m[:n], v[:n], rule)
        to_bf16_loop(w[:n].view(np.uint32), key, uint64(start), weight[start : start + n])
        _save(mean, start, n, m)
        _save(square, start, n, v)


@njit(cache=True, nogil=True)
def _counters(key, pair):
    return uint32(uint32(pair) + uint32(key)), high(key, pair)


@njit(cache=True, nogil=True)
def _address(array, start):
    return np.uintp(array.ctypes.data) + np.uintp(start * array.itemsize)


def _fused(half: bool) -> Callable:
    """A loop over groups of elements, all of `_update` in registers: the divider's waits are filled with the noise's arithmetic.

    Arguments: groups; addresses of weights, gradients and moments; counter and high key of their streams of noise; the rule.
    """

    @intrinsic
    def loop(typing_context, groups, places, streams, rule):
        def build(context, builder, signature, arguments):
            count = arguments[0]
            (weights, gradients, means, squares), keys, numbers = (cgutils.unpack_tuple(builder, each) for each in arguments[1:])
            floats, words, halves = (ir.VectorType(kind, LANES) for kind in (ir.FloatType(), WORD, HALF))
            streams = [(first_counters(builder, keys[k]), spread(builder, keys[k + 1], LANES // 2)) for k in (0, 2, 4)]
            shrink, pull, sign, keep_mean, keep_square, new_square, rate, square_rate, eps = (
                spread(builder, value, LANES) for value in numbers
            )
            root = cgutils.get_or_insert_function(builder.module, ir.FunctionType(floats, [floats]), f"llvm.sqrt.v{LANES}f32")
            fused = cgutils.get_or_insert_function(builder.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fma.v{LANES}f32")

            def fma(*terms):
                return builder.call(fused, terms)

            with cgutils.for_range(builder, count, intp=count.type) as group:

                def load(base, small):
                    kind = halves if small else floats
                    value = builder.load(element(builder, base, group.index, 2 if small else 4, kind), align=2)
                    return builder.bitcast(builder.shl(builder.zext(value, words), constant(words, 16)), floats) if small else value

                def store(value, base, small, stream):
                    if small:
                        value = round_words(builder, builder.bitcast(value, words), draw(builder, stream[0], group.index, stream[1]))
                    builder.store(value, element(builder, base, group.index, 2 if small else 4, value.type), align=2)

                w, g, m, v = load(weights, True), load(gradients, True), load(means, half), load(squares, half)
                slope = fma(pull, w, builder.fmul(sign, g))
                m = fma(keep_mean, builder.fsub(slope, m), m)
                v = fma(new_square, builder.fmul(slope, slope), builder.fmul(keep_square, v))
                change = builder.fdiv(builder.fmul(rate, m), fma(builder.call(root, [v]), square_rate, eps))
                w = builder.fsub(builder.fmul(w, shrink), change)
                store(w, weights, True, streams[0])
                store(m, means, half, streams[1])
                store(v, squares, half, streams[2])
            return context.get_dummy_value()

        return types.void(int64, places, streams, rule), build

    return loop


_wide_moments, _half_moments = _fused(False), _fused(True)


@njit(cache=True, nogil=True, error_model="numpy")
def _update(w, g, m, v, rule):
    shrink, pull, sign, keep_mean, keep_square, new_square, rate, square_rate, eps = rule
    for i in range(w.size):
        slope = sign * g[i] + pull * w[i]
        m[i] += keep_mean * (slope - m[i])
        v[i] = keep_square * v[i] + new_square * (slope * slope)
        w[i] = w[i] * shrink - rate * (m[i] / (np.sqrt(v[i]) * square_rate + eps))


@njit(cache=True, nogil=True)
def _load_half(words, out):
    for i in range(words.size):
        out[i] = as_float(uint32(uint32(words[i]) << uint32(16)))


@njit(cache=True, nogil=True)
def _copy(values, out):
    for i in range(values.size):  # numba's own slice assignment is several times slower
        out[i] = values[i]


@njit(cache=True, nogil=True)
def _load(moment, start, n, out):
    if moment.wide.size:
        _copy(moment.wide[start : start + n], out)
    elif moment.half.size:
        _load_half(moment.half[start : start + n], out)
    else:
        low, high = start // EIGHT, (start + n + EIGHT - 1) // EIGHT
        _widen_8bit(moment.codes[low:high], moment.exponents[low:high], moment.unsigned[low:high], out[:n])


@njit(cache=True, nogil=True)
def _save(moment, start, n, value):
    if moment.wide.size:
        _copy(value[:n], moment.wide[start : start + n])
    elif moment.half.size:
        to_bf16_loop(value[:n].view(np.uint32), moment.key, uint64(start), moment.half[start : start + n])
    else:
        low, high = start // EIGHT, (start + n + EIGHT - 1) // EIGHT
        codes, exponents, unsigned = moment.codes[low:high], moment.exponents[low:high], moment.unsigned[low:high]
        _pack_8bit(value[:n], moment.key, uint64(start), codes, exponents, unsigned)
