"""Is it as sure as it is right? Accuracy against confidence, one line a way of testing."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from lightning_cnn.functional.calibration import Scores, expected_calibration_error, reliability
from lightning_cnn.plot._style import figure


def reliability_diagram(scores: Mapping[str, Scores], *, bins: int = 15) -> Figure:
    """Above the diagonal a network is too modest, below it too sure; below, how many pictures have which confidence."""
    made, (axes, counts) = figure(6.0, 6.2, rows=2, sharex=True, height_ratios=[3, 1])
    axes.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--")
    for name, one in scores.items():
        found = reliability(one.confidence.cpu(), one.correct.cpu(), bins)
        full = found.count > 0
        error = expected_calibration_error(one.confidence, one.correct, bins).item()
        axes.plot(found.confidence[full], found.accuracy[full], marker="o", ms=4, lw=1.5, label=f"{name}: ECE {error:.3f}")
        counts.stairs(found.count / found.count.sum(), np.linspace(0, 1, bins + 1), lw=1.5)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    axes.grid(color="0.92")
    axes.legend(frameon=False, loc="best")
    counts.set(xlabel="confidence", ylabel="share of pictures")
    return made
