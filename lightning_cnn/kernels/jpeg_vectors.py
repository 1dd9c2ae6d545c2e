"""The steps of `jpeg` that fill vector registers, and unaligned words: what numba cannot say, or LLVM does not find.

Arithmetic is libjpeg's, to the bit. Its accurate inverse cosine transform ("islow": 13-bit constants, columns first) takes an 8 x 8
block as eight registers of eight 32-bit numbers; each pass is one straight line of vector operations, with a transposition between.

Source: Loeffler, Ligtenberg and Moschytz 1989 (the 11-multiplication scheme, here with 12 as in libjpeg's `jidctint`).
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

WORD, BYTE = ir.IntType(64), ir.IntType(8)
LANES = ir.VectorType(ir.IntType(32), 8)
STORED, PIXELS = ir.VectorType(ir.IntType(16), 8), ir.VectorType(BYTE, 8)
CONSTANT_BITS, KEPT_BITS = 13, 2


def _load_word(typing_context, data, position):
    """Eight bytes from `position` on, the first the most significant."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.bswap(builder.load(_at(builder, array.data, arguments[1], WORD), align=1))

    return types.uint64(data, position), generate


def _store_word(typing_context, data, position, word):
    """The reverse of `load_word`."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        builder.store(builder.bswap(arguments[2]), _at(builder, array.data, arguments[1], WORD), align=1)
        return context.get_dummy_value()

    return types.void(data, position, types.uint64), generate


def _inverse_cosine(typing_context, block, out, start, stride):
    """out[start + y * stride + x] = the 8 x 8 pixels of `block` (64 dequantised int16 coefficients, row by row)."""

    def generate(context, builder, signature, arguments):
        coefficients, pixels = (context.make_array(signature.args[k])(context, builder, arguments[k]).data for k in (0, 1))
        rows = [_load_row(builder, coefficients, 8 * y) for y in range(8)]
        rows = _transposed(builder, _pass(builder, rows, CONSTANT_BITS - KEPT_BITS))
        rows = _transposed(builder, _pass(builder, rows, CONSTANT_BITS + KEPT_BITS + 3))
        place = arguments[2]
        for row in rows:
            builder.store(_clamped(builder, row, 128), _at(builder, pixels, place, PIXELS), align=1)
            place = builder.add(place, arguments[3])
        return context.get_dummy_value()

    return types.void(block, out, types.int64, types.int64), generate


def _from_ycc(typing_context, luma, begin, blue, red, start, out, place):
    """Eight pixels to RGB with libjpeg's 16-bit constants: out[place : place + 24]."""

    def generate(context, builder, signature, arguments):
        planes = [context.make_array(signature.args[k])(context, builder, arguments[k]).data for k in (0, 2, 3, 5)]
        y, b, r = (
            builder.zext(builder.load(_at(builder, plane, at, PIXELS), align=1), LANES)
            for plane, at in zip(planes[:3], (arguments[1], arguments[4], arguments[4]), strict=True)
        )

        def level(*terms):
            """y + the sum of factor * (plane - 128), rounded."""
            total = _all((1 << 15) - 128 * sum(factor for factor, _ in terms))
            for factor, plane in terms:
                total = builder.add(total, builder.mul(plane, _all(factor)))
            return _clamped(builder, builder.add(y, builder.ashr(total, _all(16))), 0)

        red_green = builder.shuffle_vector(level((91881, r)), level((-22554, b), (-46802, r)), _mask(range(16)))
        blues = builder.shuffle_vector(level((116130, b)), ir.Constant(PIXELS, ir.Undefined), _mask([*range(8), *[0] * 8]))
        pixels = builder.shuffle_vector(red_green, blues, _mask([v for k in range(8) for v in (k, 8 + k, 16 + k)]))
        builder.store(pixels, _at(builder, planes[3], arguments[6], pixels.type), align=1)
        return context.get_dummy_value()

    return types.void(luma, types.int64, blue, red, types.int64, out, types.int64), generate


def _blended(typing_context, plane, near, far, sums, k):
    """sums[k : k + 8] = 3 * plane[near :] + plane[far :]."""

    def generate(context, builder, signature, arguments):
        source, target = (context.make_array(signature.args[n])(context, builder, arguments[n]).data for n in (0, 3))
        a, b = (builder.zext(builder.load(_at(builder, source, arguments[n], PIXELS), align=1), STORED) for n in (1, 2))
        builder.store(builder.add(builder.mul(a, _each(3)), b), _at(builder, target, arguments[4], STORED), align=2)
        return context.get_dummy_value()

    return types.void(plane, types.int64, types.int64, sums, types.int64), generate


def _widened(typing_context, sums, k, out, place):
    """out[place : place + 16] = the numbers between sums[k], ..., sums[k + 9]: (3 * near + far) / 16, rounded down and up in turn."""

    def generate(context, builder, signature, arguments):
        source, target = (context.make_array(signature.args[n])(context, builder, arguments[n]).data for n in (0, 2))
        before, near, after = (
            builder.load(_at(builder, source, builder.add(arguments[1], ir.Constant(WORD, d)), STORED), align=2) for d in range(3)
        )
        threefold = builder.mul(near, _each(3))
        even, odd = (
            builder.trunc(builder.lshr(builder.add(builder.add(threefold, far), _each(half)), _each(4)), PIXELS)
            for far, half in ((before, 8), (after, 7))
        )
        both = builder.shuffle_vector(even, odd, _mask([v for n in range(8) for v in (n, 8 + n)]))
        builder.store(both, _at(builder, target, arguments[3], both.type), align=1)
        return context.get_dummy_value()

    return types.void(sums, types.int64, out, types.int64), generate


def _pass(builder, x, descaled_bits):
    """One-dimensional transforms of eight columns at once."""

    def times(value, factor):
        return builder.mul(value, _all(round(factor * (1 << CONSTANT_BITS))))

    def total(*values):
        result = values[0]
        for value in values[1:]:
            result = builder.add(result, value)
        return result

    def scaled(value):
        return builder.shl(value, _all(CONSTANT_BITS))

    z = times(total(x[2], x[6]), 0.541196100)
    even2, even3 = total(z, times(x[6], -1.847759065)), total(z, times(x[2], 0.765366865))
    even0, even1 = scaled(builder.add(x[0], x[4])), scaled(builder.sub(x[0], x[4]))
    even = [builder.add(even0, even3), builder.add(even1, even2), builder.sub(even1, even2), builder.sub(even0, even3)]
    z1, z2 = times(total(x[7], x[1]), -0.899976223), times(total(x[5], x[3]), -2.562915447)
    z3, z4 = total(x[7], x[3]), total(x[5], x[1])
    z5 = times(total(z3, z4), 1.175875602)
    z3, z4 = total(times(z3, -1.961570560), z5), total(times(z4, -0.390180644), z5)
    odd = [
        total(times(x[1], 1.501321110), z1, z4),
        total(times(x[3], 3.072711026), z2, z3),
        total(times(x[5], 2.053119869), z2, z4),
        total(times(x[7], 0.298631336), z1, z3),
    ]
    sums = [builder.add(e, o) for e, o in zip(even, odd, strict=True)]
    differences = [builder.sub(e, o) for e, o in zip(even, odd, strict=True)]
    half = _all(1 << descaled_bits - 1)
    return [builder.ashr(builder.add(value, half), _all(descaled_bits)) for value in sums + differences[::-1]]


def _transposed(builder, rows):
    rows = list(rows)
    for d in (1, 2, 4):
        low = [lane if not lane & d else 8 + lane - d for lane in range(8)]
        high = [lane + d if not lane & d else 8 + lane for lane in range(8)]
        for k in range(8):
            if not k & d:
                a, b = rows[k], rows[k + d]
                rows[k], rows[k + d] = (builder.shuffle_vector(a, b, _mask(mask)) for mask in (low, high))
    return rows


def _clamped(builder, row, zero):
    """Levels around zero as bytes around `zero`."""
    row = builder.add(row, _all(zero))
    row = builder.select(builder.icmp_signed("<", row, _all(0)), _all(0), row)
    row = builder.select(builder.icmp_signed(">", row, _all(255)), _all(255), row)
    return builder.trunc(row, PIXELS)


def _load_row(builder, pointer, position):
    return builder.sext(builder.load(_at(builder, pointer, ir.Constant(WORD, position), STORED), align=2), LANES)


def _all(value):
    return ir.Constant(LANES, [value] * 8)


def _each(value):
    return ir.Constant(STORED, [value] * 8)


def _mask(lanes):
    lanes = list(lanes)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


def _at(builder, pointer, index, kind):
    return builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer())


load_word: Any = intrinsic(_load_word)
store_word: Any = intrinsic(_store_word)
inverse_cosine: Any = intrinsic(_inverse_cosine)
from_ycc: Any = intrinsic(_from_ycc)
blended: Any = intrinsic(_blended)
widened: Any = intrinsic(_widened)
