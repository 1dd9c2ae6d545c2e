"""Inner loops held in vector registers; numba's loops spill them to memory, so they are written as LLVM instructions.

`multiply_6x16` is six rows and sixteen columns of a matrix product: twelve vector sums, two loads and six broadcasts a step, which is
what the sixteen registers of AVX2 hold; `multiply_4x16` is the same for two matrices that both lie depth first. `sandwich(matrix)` makes
a loop that computes `matrix @ tile @ matrix.T` for eight channels at once, for any constant matrix. `multiply_spectra` is a row and four
columns of a complex product, four frequencies a vector. All take float32 arrays and offsets into them.

Source: Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication", section 5.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

ROWS, COLUMNS, LANES = 6, 16, 8
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_INDEX = ir.IntType(64)
intrinsic = cast(Callable[[Callable], Callable[..., Any]], numba_intrinsic)  # called without the typing context


@intrinsic
def multiply_6x16(typingctx, a, a_at, a_row, b, b_at, c, c_at, c_row, depth):
    """C[6, 16] = A[6, depth] @ B[depth, 16]; rows of A are `a_row` apart, those of B 16, those of C `c_row`."""

    def generate(context, builder, signature, args):
        A, B, C = (_start(context, builder, signature, args, i) for i in (0, 3, 5))
        _multiply(builder, ROWS, args[8], A, lambda r, t: _sum(builder, (args[2], r), t), B, C, args[7])
        return context.get_dummy_value()

    return types.void(a, a_at, a_row, b, b_at, c, c_at, c_row, depth), generate


@intrinsic
def multiply_4x16(typingctx, a, a_at, b, b_at, c, c_at, depth):
    """C[4, 16] = A[depth, 4].T @ B[depth, 16]; rows of A are 8 apart, those of B and C 16.

    A step costs two loads, four broadcasts and eight multiply-adds: with a latency of four and two of them a cycle, the eight sums are
    just enough.
    """

    def generate(context, builder, signature, args):
        A, B, C = (_start(context, builder, signature, args, i) for i in (0, 2, 4))
        _multiply(builder, 4, args[6], A, lambda r, t: _sum(builder, (t, LANES), r), B, C, ir.Constant(_INDEX, COLUMNS))
        return context.get_dummy_value()

    return types.void(a, a_at, b, b_at, c, c_at, depth), generate


@intrinsic
def correlate_8(typingctx, a, a_at, b, b_at, outer, inner, b_outer, b_inner, b_shift, out, out_at):
    """out[q] += sum over u < outer, v < inner of a[u, v] * b[u * b_outer + v * b_inner + q * b_shift], for eight shifts q.

    Every entry is a vector of eight floats and every offset counts floats; `a` is contiguous. The eight sums stay in registers, so a
    step costs nine loads and eight multiply-adds.
    """

    def generate(context, builder, signature, args):
        A, B, out = (_start(context, builder, signature, args, i) for i in (0, 2, 9))
        sums = [cgutils.alloca_once(builder, _VECTOR) for _ in range(LANES)]
        for q, cell in enumerate(sums):
            builder.store(_load(builder, out, ir.Constant(_INDEX, q * LANES)), cell)
        with cgutils.for_range(builder, args[4]) as u, cgutils.for_range(builder, args[5]) as v:
            step = builder.add(builder.mul(u.index, args[5]), v.index)
            weight = _load(builder, A, _sum(builder, (step, LANES)))
            at = builder.add(builder.mul(u.index, args[6]), builder.mul(v.index, args[7]))
            for q, cell in enumerate(sums):
                value = _load(builder, B, _sum(builder, at, (args[8], q)))
                builder.store(_fma(builder, weight, value, builder.load(cell)), cell)
        for q, cell in enumerate(sums):
            _store(builder, builder.load(cell), out, ir.Constant(_INDEX, q * LANES))
        return context.get_dummy_value()

    return types.void(a, a_at, b, b_at, outer, inner, b_outer, b_inner, b_shift, out, out_at), generate


@intrinsic
def multiply_spectra(typingctx, a, a_at, b, b_at, out, out_at, column, depth, sign_a, sign_b):
    """out[j] = sum over r < depth of a[r] * b[r, j], four complex numbers a vector; a factor whose sign is -1 is conjugated.

    Real and imaginary parts alternate. The sums of real(a) * b and imag(a) * b are kept apart and joined at the end, so that a step
    costs five loads, two shuffles and eight multiply-adds.
    """

    def generate(context, builder, signature, args):
        A, B, out = (_start(context, builder, signature, args, i) for i in (0, 2, 4))
        sums = [[cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, None)) for _ in range(4)] for _ in range(2)]
        for cell in (cell for half in sums for cell in half):
            builder.store(ir.Constant(_VECTOR, None), cell)
        with cgutils.for_range(builder, args[7]) as loop:
            value = _load(builder, A, _sum(builder, (loop.index, LANES)))
            parts = [builder.shuffle_vector(value, value, _lanes([i - i % 2 + part for i in range(LANES)])) for part in range(2)]
            for j in range(4):
                other = _load(builder, B, _sum(builder, (loop.index, 4 * LANES), j * LANES))
                for part, cells in zip(parts, sums, strict=True):
                    builder.store(_fma(builder, part, other, builder.load(cells[j])), cells[j])
        # y = (ar br - sa sb ai bi, sb ar bi + sa ai br), from the sums (ar br, ar bi) and (ai br, ai bi)
        sign_a, sign_b = _spread(builder, args[8]), _spread(builder, args[9])
        one, alternate = ir.Constant(_VECTOR, [1.0] * LANES), _lanes([i if i % 2 == 0 else LANES + i for i in range(LANES)])
        of_real = builder.shuffle_vector(one, sign_b, alternate)
        of_imaginary = builder.shuffle_vector(builder.fneg(builder.fmul(sign_a, sign_b)), sign_a, alternate)
        for j in range(4):
            crossed = builder.load(sums[1][j])
            crossed = builder.shuffle_vector(crossed, crossed, _lanes([i ^ 1 for i in range(LANES)]))
            value = _fma(builder, crossed, of_imaginary, builder.fmul(builder.load(sums[0][j]), of_real))
            _store(builder, value, out, _sum(builder, (args[6], j)))
        return context.get_dummy_value()

    return types.void(a, a_at, b, b_at, out, out_at, column, depth, sign_a, sign_b), generate


@intrinsic
def copy_8(typingctx, a, a_at, b, b_at):
    """b[:8] = a[:8]."""

    def generate(context, builder, signature, args):
        A, B = (_start(context, builder, signature, args, i) for i in (0, 2))
        _store(builder, _load(builder, A, ir.Constant(_INDEX, 0)), B, ir.Constant(_INDEX, 0))
        return context.get_dummy_value()

    return types.void(a, a_at, b, b_at), generate


@intrinsic
def transpose_8x8(typingctx, a, a_at, b, b_at, a_row, b_row):
    """b[j, i] = a[i, j] for eight rows of eight floats, `a_row` and `b_row` apart."""

    def generate(context, builder, signature, args):
        A, B = (_start(context, builder, signature, args, i) for i in (0, 2))
        rows = [_load(builder, A, _sum(builder, (args[4], i))) for i in range(LANES)]
        for width in (1, 2, 4):  # Exchange the off-diagonal quarters of every block of 2 x width
            for i in (i for i in range(LANES) if not i & width):
                upper = [j if not j & width else LANES + j - width for j in range(LANES)]
                lower = [j + width if not j & width else LANES + j for j in range(LANES)]
                pair = rows[i], rows[i + width]
                rows[i], rows[i + width] = (builder.shuffle_vector(*pair, _lanes(order)) for order in (upper, lower))
        for j, row in enumerate(rows):
            _store(builder, row, B, _sum(builder, (args[5], j)))
        return context.get_dummy_value()

    return types.void(a, a_at, b, b_at, a_row, b_row), generate


def sandwich(matrix: Sequence[Sequence[float]]) -> Callable:
    """A compiled `target = matrix @ source @ matrix.T`, for `channels` (a multiple of 8) neighbouring floats an entry.

    Rows that differ only in the sign of every other coefficient, as those of Cook and Toom do, share their halves.
    """
    rows, columns = len(matrix), len(matrix[0])

    @intrinsic
    def apply(typingctx, source, at, row, column, target, target_at, target_row, target_column, channels):
        def generate(context, builder, signature, args):
            S, T = (_start(context, builder, signature, args, i) for i in (0, 4))
            between = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(columns)] for _ in range(rows)]
            with cgutils.for_range(builder, builder.sdiv(args[8], ir.Constant(_INDEX, LANES))) as loop:
                channel = builder.mul(loop.index, ir.Constant(_INDEX, LANES))
                for j in range(columns):
                    line = [_load(builder, S, _sum(builder, (args[2], i), (args[3], j), channel)) for i in range(columns)]
                    for cells, value in zip(between, _combine(builder, matrix, line), strict=True):
                        builder.store(value, cells[j])
                for i in range(rows):
                    for j, value in enumerate(_combine(builder, matrix, [builder.load(cell) for cell in between[i]])):
                        _store(builder, value, T, _sum(builder, (args[6], i), (args[7], j), channel))
            return context.get_dummy_value()

        return types.void(source, at, row, column, target, target_at, target_row, target_column, channels), generate

    return apply


def _multiply(builder, rows, depth, A, at, B, C, c_row):
    """C[r] = sum over t < depth of A[at(r, t)] * B[t], for rows of sixteen columns, in two vector sums a row."""
    sums = [[cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, None)) for _ in range(2)] for _ in range(rows)]
    for cell in (cell for row in sums for cell in row):
        builder.store(ir.Constant(_VECTOR, None), cell)
    with cgutils.for_range(builder, depth) as loop:
        columns = [_load(builder, B, _sum(builder, (loop.index, COLUMNS), half * LANES)) for half in range(2)]
        for r in range(rows):
            row = _spread(builder, builder.load(builder.gep(A, [at(r, loop.index)])))
            for half in range(2):
                builder.store(_fma(builder, row, columns[half], builder.load(sums[r][half])), sums[r][half])
    for r in range(rows):
        for half in range(2):
            _store(builder, builder.load(sums[r][half]), C, _sum(builder, (c_row, r), half * LANES))


def _combine(builder, matrix, line):
    """matrix @ line, where a pair of rows even + odd and even - odd costs one extra addition instead of a second row."""
    values, i = [], 0
    while i < len(matrix):
        pair = matrix[i : i + 2]
        if (
            len(pair) == 2
            and all(a == b or a == -b for a, b in zip(*pair, strict=True))
            and any(a == b != 0 for a, b in zip(*pair, strict=True))
        ):
            even = _weighted(builder, [(a if a == b else 0) for a, b in zip(*pair, strict=True)], line)
            odd = _weighted(builder, [(a if a != b else 0) for a, b in zip(*pair, strict=True)], line)
            values += [builder.fadd(even, odd), builder.fsub(even, odd)]
            i += 2
        else:
            values.append(_weighted(builder, matrix[i], line))
            i += 1
    return values


def _weighted(builder, weights, line):
    total = None
    for weight, value in sorted(zip(weights, line, strict=True), key=lambda term: abs(term[0]) != 1):
        if weight and total is None:
            total = value if weight == 1 else builder.fmul(ir.Constant(_VECTOR, [float(weight)] * LANES), value)
        elif weight == 1:
            total = builder.fadd(total, value)
        elif weight:
            total = _fma(builder, ir.Constant(_VECTOR, [float(weight)] * LANES), value, total)
    return total


def _start(context, builder, signature, args, array):
    return builder.gep(context.make_array(signature.args[array])(context, builder, args[array]).data, [args[array + 1]])


def _sum(builder, *terms):
    """An offset: the sum of integers, values, and (value, integer) products."""
    total = ir.Constant(_INDEX, 0)
    for term in terms:
        if isinstance(term, tuple):
            term = builder.mul(term[0], ir.Constant(_INDEX, term[1]))
        total = builder.add(total, ir.Constant(_INDEX, term) if isinstance(term, int) else term)
    return total


def _load(builder, pointer, offset):
    return builder.load(builder.bitcast(builder.gep(pointer, [offset]), _VECTOR.as_pointer()), align=4)


def _store(builder, value, pointer, offset):
    builder.store(value, builder.bitcast(builder.gep(pointer, [offset]), _VECTOR.as_pointer()), align=4)


def _spread(builder, scalar):
    lane = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(lane, lane, _lanes([0] * LANES))


def _lanes(order):
    return ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(order))


def _fma(builder, a, b, c):
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32")
    return builder.call(fma, [a, b, c])
