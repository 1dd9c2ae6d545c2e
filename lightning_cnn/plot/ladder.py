"""A ladder of ideas: what each rung scores, run by run."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_cnn.plot._style import COLOURS, figure


def ladder(rungs: Mapping[str, Sequence[float]], *, xlabel: str = "test accuracy") -> Figure:
    """One row a rung: a dot for each seed, a bar for their mean; the runs of a seed share a thin line, as they are paired."""
    names, scores = list(rungs), np.array([list(v) for v in rungs.values()])
    made, (axes,) = figure(7.5, 0.75 * len(names) + 1.2)
    y = np.arange(len(names))
    axes.plot(scores, y, color="0.8", lw=0.8, zorder=1)
    for row, values in enumerate(scores):
        axes.scatter(values, np.full(len(values), row), s=14, color=COLOURS[0], alpha=0.6, zorder=2)
        axes.plot([values.mean()] * 2, [row - 0.28, row + 0.28], color=COLOURS[3], lw=2.5, zorder=3)
        axes.text(values.mean(), row - 0.36, f"{values.mean():.3f}", ha="center", va="bottom", fontsize=9, color=COLOURS[3])
    axes.set_yticks(y, names)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    return made
