"""Features as points on paper."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_cnn.plot._style import COLOURS, figure

MARKS = ("o", "s", "^")
NAME = (0.16, 0.045)  # of the picture's width and height that a name takes


def projection(points: np.ndarray, labels: np.ndarray, names: Sequence[str], *, title: str = "") -> Figure:
    """`points` (n 2), coloured by class; the name stands at the median of its points, or above the name that stands there already."""
    made, (axes,) = figure(7.0, 6.0)
    present = [label for label in range(len(names)) if (labels == label).any()]
    places = _apart([np.median(points[labels == label], 0) for label in present], np.ptp(points, 0) * NAME)
    for label, (x, y) in zip(present, places, strict=True):
        mine = points[labels == label]
        colour = COLOURS[label % len(COLOURS)]
        axes.scatter(*mine.T, s=10, color=colour, marker=MARKS[label // len(COLOURS) % len(MARKS)], alpha=0.7, lw=0)
        text = axes.text(x, y, names[label], fontsize=10, weight="bold", ha="center", va="center", color="black")
        text.set_bbox({"facecolor": "white", "alpha": 0.75, "pad": 1.5, "edgecolor": colour})
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    return made


def _apart(places: list[np.ndarray], room: np.ndarray) -> list[np.ndarray]:
    """The places, from the lowest on, each moved up until no other is within `room`."""
    settled: list[np.ndarray] = []
    for place in sorted(places, key=lambda place: place[1]):
        while any((abs(place - other) < room * 0.999).all() for other in settled):
            place += (0.0, room[1])
        settled.append(place)
    return places
