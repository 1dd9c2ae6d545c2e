# pyright: reportCallIssue=false, reportMissingParameterType=false, reportArgumentType=false, reportReturnType=false
# (numba's intrinsics are called without their first parameter)
"""Products of +-1 by +-1 on AVX2: table look-ups in place of the popcount instruction that AVX2 lacks.

Four bits of the input choose a table of 16 bytes, popcount(input ^ weight) for every nibble of weights; one `vpshufb` looks it up for
32 output channels. Two things make it fast. A table serves two neighbouring pixels, one a half byte, so a look-up does 256 products;
three look-ups fit a half byte (3 * 4 <= 15) before it is split. And the upper halves are summed as 16-bit words after a mere shift:
what leaks in from the neighbouring byte is 16 times a sum known from the lower halves, and is taken off at the end.

So nine vector instructions do 768 products of 32 channels: 341 a cycle on four vector ports. XOR, `popcnt`, add on four scalar ports
do 85, and float32 FMA 16. A tree of carry-save adders, 5 logical instructions in place of each popcount, does 157: 104 instructions
for 16 vectors of 256 products.

A 17th table, all 2, stands for zero padding: 2 of 4 bits differ, so its sum of +-1 is 0.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_cnn.kernels.addresses import ADDRESS, after, compiled, load, store

LANES = 32  # channels a vector: one a byte
STEPS = 63  # look-ups until a byte may overflow (63 * 4 <= 255), in threes
PADDING = 16  # the table of zero padding
SKIP = 0x80  # a weight byte whose look-up is 0 whatever the table

LINES = 5  # cache lines a tile asks for: 28 tiles ask for the 8 KB that the next 28 read

_BYTE, _WORD, _INT = (ir.IntType(width) for width in (8, 16, 32))
_BYTES, _HALF, _WORDS = ir.VectorType(_BYTE, 32), ir.VectorType(_BYTE, 16), ir.VectorType(_WORD, 16)


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

    Arguments, all addresses or sizes: tables; weights (3 * vectors vectors a triple); offsets (int64, where a triple's inputs lie from
    the pixel on); pixel (uint16 inputs, offsets into the tables); triples; sums (uint16, 32 * vectors of the first pixel, those of the
    second follow); ahead (what will be read soon, `LINES` lines of it).
    """

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        table_base, weights, offsets, pixel, triples, sums, ahead = arguments

        def table(step: int, place: Any) -> Any:
            index = b.zext(load(b, after(b, place, 2 * step), _WORD, 2), ADDRESS)
            half = load(b, b.add(table_base, index), _HALF, 16)
            return b.shuffle_vector(half, ir.Constant(_HALF, ir.Undefined), ir.Constant(ir.VectorType(_INT, 32), list(range(16)) * 2))

        def words(operation: str, x: Any, constant: int) -> Any:
            return getattr(b, operation)(x, ir.Constant(_WORDS, [constant] * 16))

        for line in range(LINES):
            _prefetch(b, after(b, ahead, 64 * line))
        shuffle = cgutils.get_or_insert_function(b.module, ir.FunctionType(_BYTES, [_BYTES, _BYTES]), "llvm.x86.avx2.pshuf.b")
        low = [cgutils.alloca_once_value(b, ir.Constant(_BYTES, [0] * 32)) for _ in range(vectors)]
        high = [cgutils.alloca_once_value(b, ir.Constant(_WORDS, [0] * 16)) for _ in range(vectors)]
        with cgutils.for_range(b, triples, intp=ADDRESS) as loop:
            offset = load(b, b.add(offsets, b.mul(loop.index, ir.Constant(ADDRESS, 8))), ADDRESS, 8)
            panel = b.add(weights, b.mul(loop.index, ir.Constant(ADDRESS, 96 * vectors)))
            chosen = [table(step, b.add(pixel, offset)) for step in range(3)]
            for v in range(vectors):
                found = [b.call(shuffle, (chosen[s], load(b, after(b, panel, 32 * (v + s * vectors)), _BYTES, 1))) for s in range(3)]
                three = b.add(b.add(found[0], found[1]), found[2])
                b.store(b.add(b.load(low[v]), b.and_(three, ir.Constant(_BYTES, [15] * 32))), low[v])
                b.store(b.add(b.load(high[v]), words("lshr", b.bitcast(three, _WORDS), 4)), high[v])
        for v in range(vectors):
            first = b.bitcast(b.load(low[v]), _WORDS)
            second = b.sub(b.load(high[v]), words("lshr", words("and_", first, 0xFF00), 4))
            for value, base in ((first, sums), (second, after(b, sums, 64 * vectors))):
                for half, part in enumerate((words("and_", value, 0xFF), words("lshr", value, 8))):
                    address = after(b, base, 64 * v + 32 * half)
                    store(b, b.add(load(b, address, _WORDS, 32), part), address, 32)
        return context.get_dummy_value()

    @intrinsic
    def tile(typingctx, table_base, weights, offsets, pixel, triples, sums, ahead):
        return types.void(*[types.intp] * 7), build

    return tile


def _prefetch(b: Any, address: Any) -> None:
    kinds = [ir.PointerType(_BYTE), _INT, _INT, _INT]
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0")
    b.call(function, [b.inttoptr(address, kinds[0]), *(ir.Constant(_INT, n) for n in (0, 3, 1))])  # to read, keep, data


tile_2, tile_4 = _tile(2), _tile(4)
TABLES = tables()


@compiled
def spaced(channels, kernel_w, dilation_w):
    """Steps of a run, inputs that lie side by side (a row of taps, or one tap where dilation parts them), filled to whole triples."""
    quads = (channels + 3) // 4
    return ((kernel_w if dilation_w == 1 else 1) * quads + 2) // 3 * 3


def panels(negative: np.ndarray, dilation_w: int = 1) -> np.ndarray:
    """The weights (k, c, r, s; True where below zero) for the tiles: (blocks, steps, 32 * vectors) nibbles."""
    filters, channels, rows, columns = negative.shape
    quads, vectors = -(-channels // 4), vectors_for(filters)
    blocks = -(-filters // (LANES * vectors))
    bits = np.zeros((blocks * vectors * LANES, rows, columns, quads * 4), np.uint8)
    bits[:filters, ..., :channels] = negative.transpose(0, 2, 3, 1)
    nibbles = (bits.reshape(*bits.shape[:3], quads, 4) << np.arange(4, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    runs = nibbles.reshape(blocks, vectors, 2, 16, rows if dilation_w == 1 else rows * columns, -1)
    # Byte 2i of a vector is channel i, byte 2i + 1 channel 16 + i: split into even and odd words, the sums come out in order.
    ordered = runs.transpose(0, 4, 5, 1, 3, 2).reshape(blocks, runs.shape[4], runs.shape[5], -1)
    filled = np.pad(ordered, ((0, 0), (0, 0), (0, -runs.shape[5] % 3), (0, 0)), constant_values=SKIP)
    return filled.reshape(blocks, -1, vectors * LANES)


@compiled
def vectors_for(filters):
    """Vectors a tile: 4 does more products a cycle, 2 wastes less where the filters do not fill it."""
    return 4 if (filters + 127) // 128 * 4 <= 1.25 * ((filters + 63) // 64 * 2) else 2
