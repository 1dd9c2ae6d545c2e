import pytest

from lightning_cnn.functional.plateau import plateaus


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "count"),
    [
        ([], 1, 0.0, 0),
        ([3.0, 2.0, 1.0], 1, 0.0, 0),
        ([1.0, 1.0, 1.0, 1.0], 1, 0.0, 3),
        ([1.0, 1.0, 1.0, 1.0, 1.0], 2, 0.0, 2),
        ([1.0, 0.95, 0.9, 0.85], 2, 0.2, 1),
        ([1.0, float("nan"), 0.5], 1, 0.0, 1),
    ],
)
def test_each_run_without_an_improvement_counts_once(values, patience, min_delta, count):
    assert plateaus(values, patience, min_delta) == count
