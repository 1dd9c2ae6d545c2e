"""Features as points on paper."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_cnn.plot._style import COLOURS, figure

MARKS = ("o", "s", "^")


def projection(points: np.ndarray, labels: np.ndarray, names: Sequence[str], *, title: str = "") -> Figure:
    """`points` (n 2), coloured by class; the name stands at the median of its points."""
    made, (axes,) = figure(7.0, 6.0)
    for label, name in enumerate(names):
        mine = points[labels == label]
        if not len(mine):
            continue
        colour = COLOURS[label % len(COLOURS)]
        axes.scatter(*mine.T, s=10, color=colour, marker=MARKS[label // len(COLOURS) % len(MARKS)], alpha=0.7, lw=0)
        x, y = np.median(mine, 0)
        text = axes.text(x, y, name, fontsize=10, weight="bold", ha="center", va="center", color="black")
        text.set_bbox({"facecolor": "white", "alpha": 0.75, "pad": 1.5, "edgecolor": colour})
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    return made
