"""The result of each job of a sweep, best first."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_cnn.plot._style import COLOURS, figure


def sweep(names: Sequence[str], values: Sequence[float], *, xlabel: str) -> Figure:
    """One bar a job, sorted; a job without a result keeps its name and has no bar."""
    order = sorted(range(len(names)), key=lambda k: -np.inf if np.isnan(values[k]) else values[k])
    made, (axes,) = figure(7.5, 0.32 * len(names) + 1.2)
    bars = axes.barh([names[k] for k in order], [values[k] for k in order], color=COLOURS[0])
    axes.bar_label(bars, fmt="%.4g", padding=3, fontsize=8)
    axes.set_xlabel(xlabel)
    axes.margins(x=0.12)
    return made
