"""balanced_cuts against every way to cut."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_cnn.functional.partition import balanced_cuts


def dearest(costs, cuts):
    return max(sum(costs[a:b]) for a, b in pairwise([0, *cuts, len(costs)]))


@given(st.lists(st.integers(0, 20).map(float), min_size=1, max_size=8), st.integers(1, 4))
def test_no_other_cut_is_cheaper(costs, parts):
    parts = min(parts, len(costs))
    cuts = balanced_cuts(costs, parts)
    assert sorted(set(cuts)) == cuts
    assert len(cuts) == parts - 1
    assert dearest(costs, cuts) == min(dearest(costs, other) for other in combinations(range(1, len(costs)), parts - 1))


def test_too_many_parts_are_refused():
    with pytest.raises(ValueError, match="2 costs cannot make 3 parts"):
        balanced_cuts([1.0, 2.0], 3)
