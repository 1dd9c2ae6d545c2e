"""How often a series has stopped improving, as a function of the series alone."""

from collections.abc import Sequence


def plateaus(values: Sequence[float], patience: int, min_delta: float = 0.0) -> int:
    """Number of times that `patience` values in a row brought no fall of more than `min_delta` below the best so far.

    After each plateau the patience, but not the best value, starts again. NaN is no improvement.

    >>> plateaus([1.0, 0.5, 0.5, 0.6], patience=2), plateaus([1.0, 0.9, 0.8], patience=2)
    (1, 0)
    """
    best, waited, count = float("inf"), 0, 0
    for value in values:
        if value < best - min_delta:
            best, waited = value, 0
            continue
        waited += 1
        if waited == patience:
            count, waited = count + 1, 0
    return count
