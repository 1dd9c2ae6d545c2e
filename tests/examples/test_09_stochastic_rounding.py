"""The recipe runs, at a small size."""

import runpy
from pathlib import Path

import pytest

RECIPE = runpy.run_path(str(Path(__file__).parents[2] / "examples/09_stochastic_rounding.py"))


@pytest.mark.parametrize("row", RECIPE["ROWS"], ids=" ".join)
def test_each_row_trains_and_tests(row):
    accuracy, losses = RECIPE["accuracy"](row[0], RECIPE["ROWS"][row](), seed=0, epochs=1)
    assert 0 <= accuracy <= 100
    assert losses
