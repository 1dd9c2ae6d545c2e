"""What stands before the pixels of a JPEG: its frame, its quantisation, and its Huffman codes as tables to look up (numba).

Every number is checked before it is used: a file that is anything but a plain baseline JPEG makes `read_headers` return False, and
never an access outside of an array.
"""

import numpy as np
from numba import njit

LOOK = 11  # bits looked up at once; longer codes are rare
ERROR, END = 65, 64  # in the place of a run
# Where `info` keeps what.
HEIGHT, WIDTH, PARTS, HALVED, INTERVAL, SCAN = 0, 1, 2, 3, 4, 5
QUANT, DC, AC = 6, 9, 12  # of each component
INFO = 15

ZIGZAG = np.array(
    [
        0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28,
        35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    ],
    np.uint8,
)  # fmt: skip


@njit(cache=True, nogil=True)
def empty_tables():
    """(quantisation, codes to look up, limits and offsets of long codes, their definitions, what this file has defined)."""
    return (
        np.zeros((4, 64), np.int64),
        np.zeros((8, 1 << LOOK), np.int32),
        np.zeros((8, 2, 17), np.int64),
        np.zeros((8, 16 + 256), np.uint8),
        np.zeros(12, np.bool_),
    )


@njit(cache=True, nogil=True)
def read_headers(data, info, tables):
    """Fill `info` and `tables` from the bytes of a JPEG; False where it is not of the plain kind."""
    info[:] = 0
    tables[4][:] = False
    position = 2
    if len(data) < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return False
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        start, end = position + 4, position + 2 + _number(data, position + 2)
        if end < start or end > len(data):
            return False
        part = data[start:end]
        if marker == 0xDA:
            info[SCAN] = end
            return _scan(part, info, tables[4])
        if not _segment(marker, part, info, tables):
            return False
        position = end
    return False


@njit(cache=True, nogil=True)
def _segment(marker, part, info, tables):
    quant, codes, long_codes, definitions, defined = tables
    if marker == 0xDB:
        return _quantisation(part, quant, defined)
    if marker == 0xC4:
        return _huffman(part, codes, long_codes, definitions, defined)
    if marker == 0xC0 or marker == 0xC1:
        return _frame(part, info)
    if marker == 0xDD:
        info[INTERVAL] = _number(part, 0) if len(part) == 2 else 0
        return len(part) == 2
    return marker == 0xFE or (0xE0 <= marker <= 0xEF and marker != 0xEE)  # Adobe's segment may change the colours


@njit(cache=True, nogil=True)
def _number(data, position):
    return np.int64(data[position]) << 8 | np.int64(data[position + 1])


@njit(cache=True, nogil=True)
def _quantisation(part, quant, defined):
    position = 0
    while position + 65 <= len(part):
        slot = part[position]
        if slot > 3:
            return False
        for k in range(64):
            quant[slot, k] = part[position + 1 + k]
        defined[8 + slot] = True
        position += 65
    return position == len(part)


@njit(cache=True, nogil=True)
def _frame(part, info):
    """Grey, or YCbCr with its colour whole or halved both ways."""
    if len(part) < 6 or part[0] != 8 or info[PARTS]:
        return False
    parts = np.int64(part[5])
    info[HEIGHT], info[WIDTH], info[PARTS] = _number(part, 1), _number(part, 3), parts
    if (parts != 1 and parts != 3) or len(part) != 6 + 3 * parts or not info[HEIGHT] or not info[WIDTH]:
        return False
    for c in range(parts):
        info[QUANT + c] = part[8 + 3 * c]
        if part[6 + 3 * c] != c + 1 or part[8 + 3 * c] > 3 or (c and part[7 + 3 * c] != 0x11):
            return False
    info[HALVED] = part[7] == 0x22
    # libjpeg does not smooth the chroma of pictures narrower than this.
    return part[7] == 0x11 or (part[7] == 0x22 and parts == 3 and info[WIDTH] > 4)


@njit(cache=True, nogil=True)
def _scan(part, info, defined):
    """All components in one scan, with tables that this file has defined."""
    parts = info[PARTS]
    if not parts or len(part) != 4 + 2 * parts or part[0] != parts or part[1 + 2 * parts] != 0 or part[2 + 2 * parts] != 63:
        return False
    for c in range(parts):
        dc, ac = np.int64(part[2 + 2 * c] >> 4), np.int64(part[2 + 2 * c] & 15)
        if part[1 + 2 * c] != c + 1 or dc > 3 or ac > 3:
            return False
        info[DC + c], info[AC + c] = dc, 4 + ac
        if not (defined[dc] and defined[4 + ac] and defined[8 + info[QUANT + c]]):
            return False
    return part[3 + 2 * parts] == 0


@njit(cache=True, nogil=True)
def _huffman(part, codes, long_codes, definitions, defined):
    position = 0
    while position + 17 <= len(part):
        slot, count = part[position], 0
        for k in range(16):
            count += np.int64(part[position + 1 + k])
        if slot & 0xEC or count > 256 or position + 17 + count > len(part):
            return False
        table = (slot >> 4) * 4 + (slot & 3)
        new = part[position + 1 : position + 17 + count]
        if not _same(definitions[table], new):  # most files of a set share their tables
            definitions[table, : len(new)] = new
            if not _codes(new, codes[table], long_codes[table], table >= 4):
                definitions[table, :16] = 255
                return False
        defined[table] = True
        position += 17 + count
    return position == len(part)


@njit(cache=True, nogil=True)
def _same(known, new):
    different = 0
    for k in range(len(new)):
        different |= known[k] ^ new[k]
    return different == 0


@njit(cache=True, nogil=True)
def _codes(new, look, long_code, ac):
    """Canonical codes: entries by their first `LOOK` bits, and for longer ones where each length ends and its symbols begin."""
    look[:] = 0
    code, k = 0, 0
    for length in range(1, 17):
        long_code[1, length] = k - code
        if code + new[length - 1] > 1 << length:
            return False
        for _ in range(new[length - 1]):
            if not ac and new[16 + k] > 15:
                return False
            if length <= LOOK:
                room = LOOK - length
                for rest in range(1 << room):
                    look[code << room | rest] = entry(length, new[16 + k], rest, room, ac)
            code += 1
            k += 1
        long_code[0, length] = code << 16 - length
        code <<= 1
    return True


@njit(cache=True, nogil=True)
def entry(length, symbol, rest, room, ac):
    """bits of code and number | bits of the number << 5 | run << 9; or, where `room` bits hold it, 0 and the number << 16."""
    size, run = np.int64(symbol & 15), np.int64(symbol >> 4)
    if ac and size == 0 and run != 15:
        run = END if run == 0 else ERROR
    if size > room:
        return length + size | size << 5 | run << 9
    value = rest >> room - size
    if size and value < 1 << size - 1:
        value += 1 - (1 << size)
    return length + size | run << 9 | value << 16
