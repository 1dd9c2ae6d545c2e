"""Decode a rectangle of a baseline JPEG, and little more than that (numba, GIL-free).

Pixels are those of libjpeg-turbo to the bit (accurate integer transform, smooth chroma), whatever the rectangle: a decoder that crops
changes no picture. Blocks outside of it are passed over bit by bit, without transform and colour; where the file has restart markers,
as those that `pack` writes, whole stretches are not even looked at. Grey and YCbCr, with chroma whole or halved both ways; anything
else, and anything odd, is left to libjpeg: `decode_crops` says so by a False.
"""

import numpy as np
from numba import njit

from lightning_cnn.kernels.jpeg_tables import (
    AC,
    DC,
    END,
    HALVED,
    HEIGHT,
    INFO,
    INTERVAL,
    LOOK,
    PARTS,
    QUANT,
    SCAN,
    WIDTH,
    ZIGZAG,
    empty_tables,
    entry,
    read_headers,
)
from lightning_cnn.kernels.jpeg_vectors import blended, from_ycc, inverse_cosine, load_word, store_word, widened

SLACK = 32  # bytes after the last that may be loaded, or stored


@njit(cache=True, nogil=True)
def decode_crops(source, offset, length, height, width, box, out, place):
    """out[place[b] :] = the pixels (h w 3) of `box[b]` (top, left, height, width) of the JPEG of length[b] bytes at offset[b].

    Returns which were decoded. `height` and `width` are what the files must say of themselves. Up to `SLACK` bytes after the pixels of a
    box are overwritten: leave them free, and let `place` rise.
    """
    done, info, tables = np.zeros(len(offset), np.bool_), np.zeros(INFO, np.int64), empty_tables()
    for b in range(len(offset)):
        data = source[offset[b] : offset[b] + length[b]]
        if read_headers(data, info, tables) and info[HEIGHT] == height[b] and info[WIDTH] == width[b]:
            done[b] = _decode(data, info, tables, box[b], out[place[b] :])
    return done


@njit(cache=True, nogil=True)
def _decode(data, info, tables, box, out):
    unit = 16 if info[HALVED] else 8
    across, down = -(-info[WIDTH] // unit), -(-info[HEIGHT] // unit)
    # One pixel more on each side: smooth chroma mixes neighbours.
    first_row, last_row = max(box[0] - 1, 0) // unit, min(box[0] + box[2], info[HEIGHT] - 1) // unit + 1
    first_column, last_column = max(box[1] - 1, 0) // unit, min(box[1] + box[3], info[WIDTH] - 1) // unit + 1
    area = np.array([first_row, last_row, first_column, last_column, across, down])
    stream, starts = _stretches(data, info, across * down)
    if not len(starts):
        return False
    stride = (last_column - first_column) * unit
    luma = np.empty((last_row - first_row) * unit * stride + SLACK, np.uint8)
    # Both planes, each with its own slack.
    chroma = np.empty(2 * ((last_row - first_row) * 8 * (last_column - first_column) * 8 + SLACK), np.uint8)
    if not _blocks(stream, starts, info, tables, area, luma, chroma):
        return False
    _colours(luma, stride, chroma, info, box, first_row * unit, first_column * unit, out)
    return True


@njit(cache=True, nogil=True)
def _stretches(data, info, units):
    """The entropy-coded bytes without stuffing, and where the stretches between restart markers begin and end; no starts if odd."""
    expected = -(-units // info[INTERVAL]) if info[INTERVAL] else 1
    none = np.empty(0, np.int64)
    stream = np.empty(len(data) + 2 * SLACK, np.uint8)
    if expected > len(data):
        return stream, none
    starts = np.zeros(expected + 1, np.int64)
    position, size, found = info[SCAN], 0, 0
    while position < len(data):
        while position + 8 <= len(data):
            word = load_word(data, position)
            store_word(stream, size, word)
            inverse = ~word
            if (inverse - np.uint64(0x0101010101010101)) & word & np.uint64(0x8080808080808080):
                break  # one of the eight is 0xFF
            position, size = position + 8, size + 8
        while position < len(data) and data[position] != 0xFF:
            stream[size] = data[position]
            position, size = position + 1, size + 1
        if position + 1 >= len(data):
            return stream, none
        marker = data[position + 1]
        position += 2
        if marker == 0:
            stream[size] = 0xFF
            size += 1
        elif marker == 0xD9:
            found += 1
            starts[found] = size
            stream[size : size + SLACK] = 0
            return stream[: size + SLACK], starts if found == expected else none
        elif marker == 0xD0 | (found & 7) and found + 1 < expected:
            found += 1
            starts[found] = size
        else:
            return stream, none
    return stream, none


@njit(cache=True, nogil=True, boundscheck=False)
def _blocks(stream, starts, info, tables, area, luma, chroma):
    """Transform the blocks of `area` (first and last row and column of units; units across and down)."""
    first_row, last_row, first_column, last_column, across, _ = area
    quant, codes, long_codes, definitions, _ = tables
    side = 2 if info[HALVED] else 1
    interval = info[INTERVAL] if info[INTERVAL] else across * area[5]
    stride = (last_column - first_column) * 8
    block, before = np.empty(64, np.int16), np.zeros(3, np.int64)
    stretch = (first_row * across + first_column) // interval
    while True:
        unit = stretch * interval
        row, column = unit // across, unit % across
        last = min(unit + interval, across * area[5])
        before[:] = 0
        bits, held, position = np.uint64(0), np.int64(0), starts[stretch]
        while unit < last and (row < last_row - 1 or (row == last_row - 1 and column < last_column)):
            wanted = first_row <= row and first_column <= column < last_column
            for c in range(info[PARTS]):
                for k in range(side * side if c == 0 else 1):
                    if wanted:
                        block[:] = 0
                    bits, held, position, coded, difference = _block(
                        stream, bits, held, position, codes, long_codes, definitions, info[DC + c], info[AC + c],
                        quant[info[QUANT + c]], block,
                    )  # fmt: skip
                    if coded < 0:
                        return False
                    before[c] += difference
                    if wanted:
                        block[0] = before[c] * quant[info[QUANT + c], 0]
                        y, x = row - first_row, column - first_column
                        if c == 0:
                            place = (y * side + k // side) * 8 * stride * side + (x * side + k % side) * 8
                            _pixels(block, coded, luma, place, stride * side)
                        else:
                            _pixels(block, coded, chroma, (c - 1) * (len(chroma) // 2) + y * 8 * stride + x * 8, stride)
            unit, column = unit + 1, column + 1
            if column == across:
                row, column = row + 1, 0
            if column == last_column and row >= first_row and (row + 1) * across + first_column >= last:
                break  # what is left of this stretch is not in the area
        if 8 * position - held > 8 * starts[stretch + 1]:
            return False
        # The next unit that is in the area, and not yet done.
        if row < first_row or (row == first_row and column < first_column):
            row, column = first_row, first_column
        elif column >= last_column:
            row, column = row + 1, first_column
        elif column < first_column:
            column = first_column
        if row >= last_row:
            return True
        stretch = (row * across + column) // interval


@njit(cache=True, nogil=True, boundscheck=False, forceinline=True)
def _block(stream, bits, held, position, codes, long_codes, definitions, dc, ac, quant, block):
    """Read one block: (bits, held, position, place of its last coefficient or -1 for an impossible code, difference of its first)."""
    last, limit = 0, len(stream) - 8
    bits, held, position = _refill(stream, bits, held, position, limit)
    code = np.int64(codes[dc, np.int64(bits >> np.uint64(64 - LOOK))])
    if code == 0:
        code = _long(bits, long_codes[dc], definitions[dc], False)
    bits, held, difference = _number(bits, held, code)
    k = 1 if code >> 9 & 127 < END else 128
    while k < 64:
        bits, held, position = _refill(stream, bits, held, position, limit)
        code = np.int64(codes[ac, np.int64(bits >> np.uint64(64 - LOOK))])
        if code == 0:
            code = _long(bits, long_codes[ac], definitions[ac], True)
        bits, held, value = _number(bits, held, code)
        run = code >> 9 & 127
        k += run
        if k > 63:
            return bits, held, position, last if run == END else -1, difference
        last = k & 63  # which says that it is not negative
        block[ZIGZAG[last]] = value * quant[last]
        k += 1
    return bits, held, position, last if k == 64 else -1, difference


@njit(cache=True, nogil=True, boundscheck=False, forceinline=True)
def _refill(stream, bits, held, position, limit):
    """At least 56 bits, the next one the most significant; zeros, or what follows, after the end."""
    bits |= load_word(stream, min(position, limit)) >> np.uint64(held)
    position += (63 - held) >> 3
    return bits, held | 56, position


@njit(cache=True, nogil=True, boundscheck=False, forceinline=True)
def _number(bits, held, code):
    """What an entry stands for, without a branch: half of the numbers are in the table, half in the bits after the code."""
    length, size = code & 31, code >> 5 & 15
    value = np.int64(bits << np.uint64(length - size) >> np.uint64(1) >> np.uint64(63 - size))
    value += (1 - (1 << size)) & -np.int64(value < (1 << size) >> 1)
    return bits << np.uint64(length), held - length, value + (code >> 16)


@njit(cache=True, nogil=True)
def _long(bits, long_code, definition, ac):
    """The entry of a code of more than `LOOK` bits; 66 in the place of its run if there is none."""
    head = np.int64(bits >> np.uint64(48))
    for length in range(LOOK + 1, 17):
        if head < long_code[0, length]:
            return np.int64(entry(length, definition[16 + (head >> 16 - length) + long_code[1, length]], 0, 0, ac))
    return np.int64(66 << 9)


@njit(cache=True, nogil=True, boundscheck=False, forceinline=True)
def _pixels(block, coded, flat, start, stride):
    if coded:
        inverse_cosine(block, flat, start, stride)
        return
    level = np.uint8(min(max(((np.int64(block[0]) + 4) >> 3) + 128, 0), 255))
    for y in range(8):
        flat[start + y * stride : start + y * stride + 8] = level


@njit(cache=True, nogil=True, boundscheck=False)
def _colours(luma, stride, chroma, info, box, top, left, out):
    """Pixels of `box` from planes that begin at (top, left) of the picture and have `stride` bytes to the row of luma."""
    high, wide = box[2], box[3]
    part = len(chroma) // 2
    blue, red, sums = np.empty(wide + 64, np.uint8), np.empty(wide + 64, np.uint8), np.zeros(wide // 2 + 64, np.int16)
    for y in range(high):
        begin, target = (box[0] + y - top) * stride + box[1] - left, 3 * y * wide
        if info[PARTS] == 1:
            for x in range(wide):
                out[target + 3 * x] = out[target + 3 * x + 1] = out[target + 3 * x + 2] = luma[begin + x]
        elif info[HALVED]:
            _smooth(chroma[:part], stride // 2, info, box[0] + y, box[1], wide, top // 2, left // 2, sums, blue)
            _smooth(chroma[part:], stride // 2, info, box[0] + y, box[1], wide, top // 2, left // 2, sums, red)
            for x in range(0, wide, 8):
                from_ycc(luma, begin + x, blue, red, (box[1] & 1) + x, out, target + 3 * x)
        else:
            for x in range(0, wide, 8):
                from_ycc(luma, begin + x, chroma[:part], chroma[part:], begin + x, out, target + 3 * x)


@njit(cache=True, nogil=True, boundscheck=False)
def _smooth(plane, stride, info, y, x, wide, top, left, sums, out):
    """Row y of a halved plane at full size, from pixel x & ~1 on: weights 3/4 and 1/4 both ways, as libjpeg's "fancy" upsampling."""
    high, across = (info[HEIGHT] + 1) // 2, (info[WIDTH] + 1) // 2
    near = y // 2
    far = min(near + 1, high - 1) if y & 1 else max(near - 1, 0)
    first, last = x // 2, (x + wide - 1) // 2
    low, after = max(first - 1, 0), min(last + 1, across - 1)
    a, b = (near - top) * stride + low - left, (far - top) * stride + low - left
    for k in range(0, after + 1 - low, 8):
        blended(plane, a + k, b + k, sums, 1 + low - first + k)
    if first == 0:
        sums[0] = sums[1]
    if last == across - 1:
        sums[2 + last - first] = sums[1 + last - first]
    for k in range(0, last - first + 1, 8):
        widened(sums, k, out, 2 * k)
