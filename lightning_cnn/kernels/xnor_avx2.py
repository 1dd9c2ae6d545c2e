# pyright: reportCallIssue=false, reportMissingParameterType=false, reportArgumentType=false, reportReturnType=false
# (numba's intrinsics are called without their first parameter)
"""Products of +-1 by +-1 on AVX2: table look-ups in place of the popcount instruction that AVX2 lacks.

Four bits of the input choose a table of 16 bytes, popcount(input ^ weight) for every nibble of weights; one `vpshufb` looks it up for
32 output channels. Two things make it fast. A table serves two neighbouring pixels, one a half byte, so a look-up does 256 products;
three look-ups fit a half byte (3 * 4 <= 15) before it is split. And the upper halves are summed as 16-bit words after a mere shift:
what leaks in from the neighbouring byte is 16 times a sum known from the lower halves, and is taken off at the end.

So nine vector instructions do 768 products of 32 channels: 341 a cycle on four vector ports. XOR, `popcnt`, add on four scalar ports
do 85, and float32 FMA 16.

A 17th table, all 2, stands for zero padding: 2 of 4 bits differ, so its sum of +-1 is 0.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_cnn.kernels.bits import (
    Bits,
    Floats,
    Geometry,
    both,
    chosen,
    empty_outputs,
    finish_arrays,
    finish_bits,
    finish_floats,
    taps_inside,
)

LANES = 32  # channels a vector: one a byte
STEPS = 63  # look-ups until a byte may overflow (63 * 4 <= 255), in threes
PADDING = 16  # the table of zero padding
SKIP = 0x80  # a weight byte whose look-up is 0 whatever the table

_BYTE, _WORD, _INT, _ADDRESS = (ir.IntType(width) for width in (8, 16, 32, 64))
_BYTES, _HALF, _WORDS = ir.VectorType(_BYTE, 32), ir.VectorType(_BYTE, 16), ir.VectorType(_WORD, 16)


class _Size(NamedTuple):
    """Of an output image: pixels, pairs a row, nibbles an input pixel; and the pixels of the input image."""

    height: int
    width: int
    pairs: int
    quads: int
    from_height: int
    from_width: int


def tables() -> np.ndarray:
    """Table `first + 17 * second` holds popcount(first ^ w) + 16 * popcount(second ^ w) for w in 0..15, 64-byte aligned."""
    nibble = np.arange(16, dtype=np.uint8)
    one = np.vstack([np.bitwise_count(nibble[:, None] ^ nibble), np.full((1, 16), 2, np.uint8)])
    return aligned((one[None] + 16 * one[:, None]).reshape(17 * 17, 16))


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 64 bytes; a vector load across two cache lines costs two."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _tile(vectors: int) -> Any:
    """Add to `sums` the popcounts of two pixels by `vectors` * 32 channels over `triples` * 3 nibbles, at most `STEPS`.

    Arguments, all addresses or sizes: tables; weights (3 * vectors vectors a triple); offsets (uint32, where a step's input lies from
    the pixel on); pixel (uint16 input, an offset into the tables); triples; sums (uint16, 32 * vectors of the first pixel); pitch
    (bytes to those of the second).
    """

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        table_base, weights, offsets, pixel, triples, sums, pitch = arguments

        def pointer(address: Any, kind: Any) -> Any:
            return b.inttoptr(address, ir.PointerType(kind))

        def load(address: Any, kind: Any, align: int) -> Any:
            value = b.load(pointer(address, kind))
            value.align = align
            return value

        def at(base: Any, distance: int) -> Any:
            return b.add(base, ir.Constant(_ADDRESS, distance))

        def table(step: int, place: Any) -> Any:
            offset = b.zext(load(at(place, 4 * step), _INT, 4), _ADDRESS)
            index = b.zext(load(b.add(pixel, offset), _WORD, 2), _ADDRESS)
            half = load(b.add(table_base, index), _HALF, 16)
            return b.shuffle_vector(half, ir.Constant(_HALF, ir.Undefined), ir.Constant(ir.VectorType(_INT, 32), list(range(16)) * 2))

        def words(operation: str, x: Any, constant: int) -> Any:
            return getattr(b, operation)(x, ir.Constant(_WORDS, [constant] * 16))

        shuffle = cgutils.get_or_insert_function(b.module, ir.FunctionType(_BYTES, [_BYTES, _BYTES]), "llvm.x86.avx2.pshuf.b")
        low = [cgutils.alloca_once_value(b, ir.Constant(_BYTES, [0] * 32)) for _ in range(vectors)]
        high = [cgutils.alloca_once_value(b, ir.Constant(_WORDS, [0] * 16)) for _ in range(vectors)]
        with cgutils.for_range(b, triples, intp=_ADDRESS) as loop:
            place = b.add(offsets, b.mul(loop.index, ir.Constant(_ADDRESS, 12)))
            panel = b.add(weights, b.mul(loop.index, ir.Constant(_ADDRESS, 96 * vectors)))
            chosen = [table(step, place) for step in range(3)]
            for v in range(vectors):
                found = [b.call(shuffle, (chosen[s], load(at(panel, 32 * (v + s * vectors)), _BYTES, 32))) for s in range(3)]
                three = b.add(b.add(found[0], found[1]), found[2])
                b.store(b.add(b.load(low[v]), b.and_(three, ir.Constant(_BYTES, [15] * 32))), low[v])
                b.store(b.add(b.load(high[v]), words("lshr", b.bitcast(three, _WORDS), 4)), high[v])
        for v in range(vectors):
            first = b.bitcast(b.load(low[v]), _WORDS)
            second = b.sub(b.load(high[v]), words("lshr", words("and_", first, 0xFF00), 4))
            for value, base in ((first, sums), (second, b.add(sums, pitch))):
                for half, part in enumerate((words("and_", value, 0xFF), words("lshr", value, 8))):
                    address = at(base, 64 * v + 32 * half)
                    total = b.store(b.add(load(address, _WORDS, 32), part), pointer(address, _WORDS))
                    total.align = 32
        return context.get_dummy_value()

    @intrinsic
    def tile(typingctx, table_base, weights, offsets, pixel, triples, sums, pitch):
        return types.void(*[types.uintp] * 7), build

    return tile


_PAIRS = 28  # pixel pairs a task: their sums stay in the first-level cache
_tile_2, _tile_4 = _tile(2), _tile(4)
_TABLES = tables()


def panels(negative: np.ndarray) -> np.ndarray:
    """The weights (k, c, r, s; True where below zero) for the tiles: (blocks, steps, 32 * vectors) nibbles, 64-byte aligned."""
    filters, channels, *taps = negative.shape
    quads = -(-channels // 4)
    vectors = vectors_for(filters)
    blocks = -(-filters // (LANES * vectors))
    bits = np.zeros((blocks * vectors * LANES, *taps, quads, 4), np.uint8)
    bits[:filters].reshape(filters, *taps, quads * 4)[..., :channels] = negative.transpose(0, 2, 3, 1)
    steps = taps[0] * taps[1] * quads
    nibbles = (bits << np.arange(4, dtype=np.uint8)).sum(-1, dtype=np.uint8).reshape(blocks, vectors, 2, 16, steps)
    panel = np.full((blocks, -(-steps // 3) * 3, vectors * LANES), SKIP, np.uint8)
    # Byte 2i of a vector is channel i, byte 2i + 1 channel 16 + i: split into even and odd words, the sums come out in order.
    panel[:, :steps] = nibbles.transpose(0, 4, 1, 3, 2).reshape(blocks, steps, -1)
    return aligned(panel)


def vectors_for(filters: int) -> int:
    """Vectors a tile: 4 does more products a cycle, 2 wastes less where the filters do not fill it."""
    return min((4, 2), key=lambda v: -(-filters // (LANES * v)) * v * (1.0, 1.25)[v == 2])


@intrinsic
def _spread(typingctx, word, address):
    """Write the 16 nibbles of `word` as uint16 to `address`."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        wide, many = ir.VectorType(_ADDRESS, 16), ir.Constant(ir.VectorType(_INT, 16), [0] * 16)
        one = b.insert_element(ir.Constant(wide, ir.Undefined), arguments[0], ir.Constant(_INT, 0))
        nibbles = b.and_(
            b.lshr(b.shuffle_vector(one, one, many), ir.Constant(wide, list(range(0, 64, 4)))), ir.Constant(wide, [15] * 16)
        )
        stored = b.store(b.trunc(nibbles, _WORDS), b.inttoptr(arguments[1], ir.PointerType(_WORDS)))
        stored.align = 2
        return context.get_dummy_value()

    return types.void(types.uint64, types.uintp), build


def _expand(words, quads, stride_w, padding_h, padding_w, inputs):
    """Packed words (n, h, w, c / 64) to table offsets (n, rows, columns * quads) of pixel pairs `stride_w` columns apart."""
    batch, height, width, per_pixel = words.shape
    rows, size = inputs.shape[1], inputs.shape[2]
    apart = stride_w * quads
    for task in prange(batch * rows):
        n, y = task // rows, task % rows - padding_h
        nibbles = np.full(size + apart + 16, PADDING, np.uint16)
        base = np.uintp(nibbles.ctypes.data)
        if 0 <= y < height:
            for x in range(min(width, (size + apart) // quads - padding_w)):
                for k in range(per_pixel):
                    _spread(words[n, y, x, k], base + np.uintp(2 * ((x + padding_w) * quads + 16 * k)))
                # A last word that is not full has spilled zeros into its neighbour, which comes next, or into the padding.
                nibbles[(x + 1 + padding_w) * quads : (x + 1 + padding_w) * quads + 16] = PADDING
        first, second, row = nibbles[:size], nibbles[apart : apart + size], inputs[n, task % rows]
        for i in range(size):
            row[i] = first[i] * np.uint16(16) + second[i] * np.uint16(16 * 17)


_EXPAND = both(_expand)


@njit(boundscheck=False, nogil=True, error_model="numpy", cache=True)
def _multiply(base, columns, panel, offsets, block, size, geometry, begin, end, sums):
    """Popcounts of the pixel pairs `begin` to `end` of an image with the filters of `block`."""
    steps, lanes = panel.shape[1], panel.shape[2]
    pitch, table = np.uintp(2 * lanes), np.uintp(_TABLES.ctypes.data)
    for i in range(2 * (end - begin) * lanes):
        sums[i] = 0
    for step in range(0, steps, STEPS):
        triples = np.uintp(min(STEPS, steps - step) // 3)
        weights = np.uintp(panel.ctypes.data) + np.uintp((block * steps + step) * lanes)
        places = np.uintp(offsets.ctypes.data) + np.uintp(4 * step)
        y, x = divmod(begin, size.pairs)
        here = np.uintp(sums.ctypes.data)
        for _ in range(begin, end):
            at = (y * geometry.stride_h * columns + 2 * x * geometry.stride_w) * size.quads
            if lanes == 4 * LANES:
                _tile_4(table, weights, places, base + np.uintp(2 * at), triples, here, pitch)
            else:
                _tile_2(table, weights, places, base + np.uintp(2 * at), triples, here, pitch)
            here += pitch + pitch
            x += 1
            if x == size.pairs:
                x, y = 0, y + 1


@njit(boundscheck=False, nogil=True, error_model="numpy", cache=True)
def _finish(sums, first, lanes, size, geometry, begin, end, affine, floats, threshold, flip, bits):
    """The sums of `_multiply` into an image of `floats` (h, w, k) or, where that has no filters, `bits` (h, w, k / 64)."""
    taps, fill = geometry.kernel_h * geometry.kernel_w, 4 * size.quads - geometry.channels
    filters, words = floats.shape[2], bits.shape[2]
    y, x = divmod(begin, size.pairs)
    x *= 2
    for i in range(2 * (end - begin)):
        if x < size.width:
            total = taps * geometry.channels
            if fill:  # a padded tap adds 2 a nibble to the sum, and has fewer than 4 channels to answer for
                rows = taps_inside(y, geometry.stride_h, geometry.padding_h, geometry.dilation_h, geometry.kernel_h, size.from_height)
                total += (
                    taps
                    - rows
                    * taps_inside(x, geometry.stride_w, geometry.padding_w, geometry.dilation_w, geometry.kernel_w, size.from_width)
                ) * fill
            row = np.uintp(sums.ctypes.data) + np.uintp(2 * i * lanes)
            pixel = y * size.width + x
            if filters:
                scale = np.uintp(affine.ctypes.data) + np.uintp(4 * first)
                out = np.uintp(floats.ctypes.data) + np.uintp(4 * (pixel * filters + first))
                finish_floats(row, total, scale, np.uintp(4 * filters), out, min(lanes, filters - first))
            else:
                limits = np.uintp(threshold.ctypes.data) + np.uintp(4 * first)
                turned = np.uintp(flip.ctypes.data) + np.uintp(first // 8)
                out = np.uintp(bits.ctypes.data) + np.uintp(8 * (pixel * words + first // 64))
                finish_bits(row, total, limits, turned, out, min(lanes // 64, words - first // 64))
        x += 1
        if x == 2 * size.pairs:
            x, y = 0, y + 1


@njit(boundscheck=False, nogil=True, error_model="numpy", cache=True)
def _task(n, begin, inputs, panel, offsets, size, geometry, affine, floats, threshold, flip, bits):
    lanes, end = panel.shape[2], min(begin + _PAIRS, size.height * size.pairs)
    room = np.empty(2 * _PAIRS * lanes + 32, np.uint16)
    skew = (64 - np.int64(room.ctypes.data) % 64) % 64 // 2
    sums = room[skew : skew + 2 * _PAIRS * lanes]
    base = np.uintp(inputs.ctypes.data) + np.uintp(n * inputs.shape[1] * inputs.shape[2] * 2)
    for block in range(panel.shape[0]):
        _multiply(base, inputs.shape[2] // size.quads, panel, offsets, block, size, geometry, begin, end, sums)
        _finish(sums, block * lanes, lanes, size, geometry, begin, end, affine, floats[n], threshold, flip, bits[n])


def _convolve(inputs, panel, offsets, size, geometry, affine, floats, threshold, flip, bits):
    tasks = (size.height * size.pairs + _PAIRS - 1) // _PAIRS
    for task in prange(inputs.shape[0] * tasks):
        _task(task // tasks, task % tasks * _PAIRS, inputs, panel, offsets, size, geometry, affine, floats, threshold, flip, bits)


_CONVOLVE = both(_convolve)


def convolve(
    words: np.ndarray, panel: np.ndarray, filters: int, geometry: Geometry, finish: Floats | Bits, threads: int = 1
) -> np.ndarray:
    """`kernels.xnor.convolve` by table look-ups."""
    batch, height, width, _ = words.shape
    out_h, out_w = geometry.output_size(height, width)
    quads = -(-geometry.channels // 4)
    columns = (2 * ((out_w + 1) // 2) - 2) * geometry.stride_w + (geometry.kernel_w - 1) * geometry.dilation_w + 1
    inputs = np.empty((batch, height + 2 * geometry.padding_h, columns * quads), np.uint16)
    chosen(_EXPAND, threads)(words, quads, geometry.stride_w, geometry.padding_h, geometry.padding_w, inputs)
    offsets = _offsets(geometry, quads, columns, panel.shape[1])
    floats, bits = empty_outputs((batch, out_h, out_w, filters), finish)
    affine, threshold, flip = finish_arrays(finish)
    size = _Size(out_h, out_w, (out_w + 1) // 2, quads, height, width)
    chosen(_CONVOLVE, threads)(inputs, panel, offsets, size, geometry, affine, floats, threshold, flip, bits)
    return floats if isinstance(finish, Floats) else bits


@lru_cache(1024)  # making them anew cost a 512x7x7 layer 0.1 of its 0.4 ms
def _offsets(geometry: Geometry, quads: int, columns: int, steps: int) -> np.ndarray:
    """Bytes from a pixel's first input to the input of each step; padded steps look anywhere, as their weights are `SKIP`."""
    y, x = np.arange(geometry.kernel_h) * geometry.dilation_h, np.arange(geometry.kernel_w) * geometry.dilation_w
    places = ((y[:, None] * columns + x)[..., None] * quads + np.arange(quads)).reshape(-1)
    return np.pad(2 * places, (0, steps - places.size)).astype(np.uint32)
