"""Cut a chain of costs into parts that are as equal as can be."""

from collections.abc import Sequence
from itertools import accumulate

__all__ = ["balanced_cuts"]


def balanced_cuts(costs: Sequence[float], parts: int) -> list[int]:
    """Where to cut `costs` so that the dearest of `parts` neighbouring parts is as cheap as possible; each part has at least one.

    >>> balanced_cuts([1.0, 1.0, 1.0, 1.0, 4.0], 2)
    [4]
    """
    if not 1 <= parts <= len(costs):
        raise ValueError(f"{len(costs)} costs cannot make {parts} parts; give 1 to {len(costs)}")
    totals = [0.0, *accumulate(costs)]
    best: list[tuple[float, list[int]]] = [(totals[n], []) for n in range(len(costs) + 1)]
    for used in range(1, parts):
        best = [
            min(
                ((max(best[cut][0], totals[n] - totals[cut]), [*best[cut][1], cut]) for cut in range(used, n)),
                default=(float("inf"), []),
            )
            for n in range(len(costs) + 1)
        ]
    return best[-1][1]
