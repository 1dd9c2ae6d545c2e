"""An index is looked at in one pass, and every impossible number in it is found."""

import numpy as np
import pytest

from lightning_cnn.data._format import INDEX
from lightning_cnn.kernels.index import first_impossible

FIRST, END = 4096, 4096 + 100 * 60


def entries(**changed):
    """A hundred raw pictures of 4 x 5; number 70 is changed."""
    index = np.zeros(100, INDEX)
    index["offset"], index["length"], index["height"], index["width"] = FIRST + 60 * np.arange(100), 60, 4, 5
    for name, value in changed.items():
        index[name][70] = value
    return index


def found(index, raw=True, shape=(4, 5), channels=3):
    numbers = FIRST, END, channels, raw, *shape
    return first_impossible(index.view("<u8").reshape(-1, 4), *map(np.uint64, numbers))


HUGE = (1 << 64) - 1
IMPOSSIBLE = [
    {"offset": FIRST - 1}, {"offset": END - 59}, {"offset": HUGE}, {"offset": HUGE - 59}, {"offset": 0}, {"length": 61}, {"length": 0},
    {"length": (1 << 32) - 1}, {"height": 0}, {"width": 0}, {"height": 5, "width": 4}, {"height": 65535, "width": 65535},
    {"height": 8, "length": 120},
]  # fmt: skip


@pytest.mark.parametrize("changed", IMPOSSIBLE, ids=str)
def test_an_impossible_number_is_found_wherever_it_stands(changed):
    assert found(entries(**changed)) == 70


def test_what_is_possible_passes():
    assert found(entries()) == -1
    assert found(entries(label=-1, checksum=HUGE)) == -1
    assert found(entries(length=7), raw=False) == -1
    assert found(entries(height=2, width=10), shape=(0, 0)) == -1
    assert found(entries(offset=END - 60)) == -1
