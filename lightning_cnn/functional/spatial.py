"""Which rows of a picture a layer needs: the arithmetic of dividing one picture among several devices.

Everything is said about one axis; height and width are divided alike and independently. Positions may lie outside the picture:
that is padding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Interval", "adaptive_weights", "divisors", "hull", "output_size", "padded_sources", "reach", "split"]


class Interval(NamedTuple):
    """The positions from `start` up to, not including, `stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return max(0, self.stop - self.start)

    def overlap(self, other: "Interval") -> "Interval":
        """
        >>> Interval(0, 5).overlap(Interval(3, 9))
        Interval(start=3, stop=5)
        """
        return Interval(max(self.start, other.start), min(self.stop, other.stop))

    def within(self, other: "Interval") -> slice:
        """This interval in the coordinates of one that holds it."""
        return slice(self.start - other.start, self.stop - other.start)


def split(size: int, parts: int) -> list[Interval]:
    """`size` positions as `parts` neighbours whose sizes differ by at most one.

    >>> [tuple(part) for part in split(7, 2)]
    [(0, 3), (3, 7)]
    """
    return [Interval(i * size // parts, (i + 1) * size // parts) for i in range(parts)]


def output_size(size: int, *, kernel: int, stride: int, before: int, after: int, dilation: int = 1, ceil: bool = False) -> int:
    """Positions a window takes; with `ceil` the last one may hang over the end, but must begin inside (torch's `ceil_mode`).

    >>> output_size(6, kernel=3, stride=2, before=0, after=0), output_size(6, kernel=3, stride=2, before=0, after=0, ceil=True)
    (2, 3)
    """
    room = size + before + after - dilation * (kernel - 1) - 1
    if not ceil:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= size + before else count


def reach(outputs: Interval, *, kernel: int, stride: int, before: int, dilation: int = 1) -> Interval:
    """Input positions that a window reads for these outputs.

    >>> reach(Interval(4, 8), kernel=3, stride=2, before=1)
    Interval(start=7, stop=16)
    """
    return Interval(outputs.start * stride - before, (outputs.stop - 1) * stride - before + dilation * (kernel - 1) + 1)


def divisors(outputs: Interval, size: int, *, kernel: int, stride: int, before: int, after: int, padding: bool) -> Float[Tensor, " n"]:
    """How many positions an average-pooling window counts along this axis, with or without the padding (`count_include_pad`).

    >>> divisors(Interval(0, 3), 5, kernel=3, stride=2, before=1, after=1, padding=False).tolist()
    [2.0, 3.0, 2.0]
    """
    counts = []
    for i in range(outputs.start, outputs.stop):
        start = i * stride - before
        stop = min(start + kernel, size + after)
        counts.append(stop - start if padding else min(stop, size) - max(start, 0))
    return torch.tensor(counts, dtype=torch.float64)


def adaptive_weights(inputs: Interval, size: int, outputs: int) -> Float[Tensor, "outputs inputs"]:
    """Adaptive average pooling along one axis as a matrix: the columns of the positions `inputs`.

    >>> adaptive_weights(Interval(0, 3), 3, 2)
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.5000, 0.5000]], dtype=torch.float64)
    """
    weights = torch.zeros(outputs, size, dtype=torch.float64)
    for i in range(outputs):
        start, stop = i * size // outputs, -(-(i + 1) * size // outputs)
        weights[i, start:stop] = 1 / (stop - start)
    return weights[:, inputs.start : inputs.stop]


def padded_sources(size: int, before: int, after: int, mode: str) -> list[int]:
    """The position each position of a padded axis copies, for `reflect`, `replicate` and `circular` padding.

    >>> padded_sources(4, 2, 1, "reflect"), padded_sources(4, 1, 1, "circular")
    ([2, 1, 0, 1, 2, 3, 2], [3, 0, 1, 2, 3, 0])
    """
    positions = range(-before, size + after)
    if mode == "circular":
        return [i % size for i in positions]
    if mode == "replicate":
        return [min(max(i, 0), size - 1) for i in positions]
    return [size - 1 - abs(size - 1 - abs(i)) for i in positions]


def hull(positions: Sequence[int]) -> Interval:
    """The smallest interval that holds them.

    >>> hull([4, 2, 3])
    Interval(start=2, stop=5)
    """
    return Interval(min(positions), max(positions) + 1)
