"""xxh3 inside compiled code is xxh3."""

import numpy as np
from xxhash import xxh3_64_intdigest

from lightning_cnn.kernels.checksum import BLOCK, SHORT, STRIPE, first_wrong, xxh3


def test_it_is_the_library_s_at_every_kind_of_length():
    draw = np.random.default_rng(0)
    around = [n + d for n in (STRIPE * 5, BLOCK, BLOCK + STRIPE, 2 * BLOCK, 7 * BLOCK) for d in (-1, 0, 1)]
    for length in [SHORT + 1, *around, *draw.integers(SHORT + 1, 5000, 200)]:
        data = draw.integers(0, 256, length).astype(np.uint8)
        assert int(xxh3(data)) == xxh3_64_intdigest(data.data)


def test_the_first_wrong_piece_among_those_asked_for_is_named():
    data = np.arange(4000).astype(np.uint8)
    offset, length = np.arange(4) * 1000, np.full(4, 1000)
    expected = np.array([xxh3_64_intdigest(data[k : k + 1000].data) for k in offset], np.uint64)
    data[2500] ^= 1
    assert first_wrong(data, offset, (length, expected, np.ones(4, np.bool_))) == 2
    assert first_wrong(data, offset, (length, expected, np.array([True, True, False, True]))) == -1
