"""One output pixel as one vector register: what LLVM does not find by itself in `resample` and `augment`.

A pixel has three floats; the vector has four lanes, of which the last is rubbish that the next pixel overwrites. Left to itself LLVM
gathers lane by lane: measured 2.1x slower for the whole crop-and-resize.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FOUR, EIGHT = ir.VectorType(ir.FloatType(), 4), ir.VectorType(ir.FloatType(), 8)


def mix(taps: int) -> Callable[..., None]:
    """A function (row, p, weight, j, out, q) for compiled code: out[q : q + 4] = sum over t of weight[t, j] * row[p + 3 * t : + 4].

    `row` and `out` are float32 vectors, `weight` is a C-ordered float32 matrix; nothing is checked.
    """

    @intrinsic
    def mix_pixels(typing_context, row, p, weight, j, out, q):
        signature = types.void(row, p, weight, j, out, q)

        def generate(context, builder, signature, arguments):
            arrays = [context.make_array(signature.args[k])(context, builder, arguments[k]) for k in (0, 2, 4)]
            source, matrix, target = (array.data for array in arrays)
            stride = cgutils.unpack_tuple(builder, arrays[1].shape)[1]
            total = None
            for tap in range(taps):
                at = builder.add(arguments[3], builder.mul(stride, ir.Constant(stride.type, tap)))
                factor = _splat(builder, builder.load(builder.gep(matrix, [at])))
                shifted = builder.add(arguments[1], ir.Constant(arguments[1].type, 3 * tap))
                pixel = builder.load(_vector_at(builder, source, shifted), align=4)
                term = builder.fmul(factor, pixel, flags=("fast",))
                total = term if total is None else builder.fadd(total, term, flags=("fast",))
            builder.store(total, _vector_at(builder, target, arguments[5]), align=4)
            return context.get_dummy_value()

        return signature, generate

    return mix_pixels


def _stream_scaled(typing_context, row, gain, shift, out, k):
    """out[k : k + 8] = row * gain + shift (each at k), past the caches: nobody reads a batch before the next has been written."""
    signature = types.void(row, gain, shift, out, k)

    def generate(context, builder, signature, arguments):
        arrays = [context.make_array(signature.args[n])(context, builder, arguments[n]) for n in range(4)]
        row, gain, shift = (builder.load(_vector_at(builder, array.data, arguments[4], EIGHT), align=4) for array in arrays[:3])
        value = builder.fadd(builder.fmul(row, gain, flags=("fast",)), shift, flags=("fast",))
        stored = builder.store(value, _vector_at(builder, arrays[3].data, arguments[4], EIGHT), align=32)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return signature, generate


def _fence(typing_context):
    """Streamed stores are visible to other threads from here on."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _bilinear(typing_context, source, at, stride, fx, fy, out, q):
    """out[q : q + 4] = the pixels of four floats at `at`, `at + 4` and both `+ stride`, mixed by `fx` across and `fy` down."""
    signature = types.void(source, at, stride, fx, fy, out, q)

    def generate(context, builder, signature, arguments):
        flat, target = (context.make_array(signature.args[n])(context, builder, arguments[n]).data for n in (0, 5))
        at, stride, fx, fy = arguments[1:5]
        upper, lower = (builder.load(_vector_at(builder, flat, index, EIGHT), align=4) for index in (at, builder.add(at, stride)))
        both = builder.fadd(
            upper, builder.fmul(_splat(builder, fy, EIGHT), builder.fsub(lower, upper), flags=("fast",)), flags=("fast",)
        )
        left, right = (_half(builder, both, first) for first in (0, 4))
        mixed = builder.fadd(left, builder.fmul(_splat(builder, fx), builder.fsub(right, left), flags=("fast",)), flags=("fast",))
        builder.store(mixed, _vector_at(builder, target, arguments[6]), align=4)
        return context.get_dummy_value()

    return signature, generate


def _half(builder, vector, first):
    order = ir.Constant(ir.VectorType(ir.IntType(32), 4), [first, first + 1, first + 2, first + 3])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), order)


def _vector_at(builder, pointer, index, vector=FOUR):
    return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())


def _splat(builder, value, vector=FOUR):
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(
        one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    )


stream_scaled: Any = intrinsic(_stream_scaled)
bilinear: Any = intrinsic(_bilinear)
fence: Any = intrinsic(_fence)
