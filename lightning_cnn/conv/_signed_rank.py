"""Is one way slower than another, or was it the noise? Times of the two, taken in turns, answer.

Source: Wilcoxon 1945, "Individual comparisons by ranking methods", Biometrics Bulletin 1 (the signed-rank test).
"""

from collections.abc import Sequence

FALSE_ALARM = 0.05


def slower(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether `ours` take longer than the `theirs` measured beside them; when they do not, True comes in at most one case of twenty.

    Every pattern of signs of the differences is then equally probable, whatever noise the machine makes, and the sum of the ranks of
    those that we lost has a distribution that can be counted.

    >>> slower([1.1, 1.2, 1.1, 1.3, 1.2], [1.0] * 5), slower([1.1, 1.2, 1.1, 1.3, 0.9], [1.0] * 5)
    (True, False)
    """
    lost = sorted((a - b for a, b in zip(ours, theirs, strict=True)), key=abs)
    patterns = [1]  # in how many patterns the ranks lost add up to 0, 1, 2, ...
    for rank in range(1, len(lost) + 1):
        patterns = [a + b for a, b in zip(patterns + [0] * rank, [0] * rank + patterns, strict=True)]
    found = sum(rank for rank, difference in enumerate(lost, 1) if difference > 0)
    return sum(patterns[found:]) <= FALSE_ALARM * 2 ** len(lost)
