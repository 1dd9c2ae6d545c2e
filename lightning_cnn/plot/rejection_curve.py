"""What refusing the least confident pictures buys."""

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_cnn.functional.calibration import Scores, accuracy_by_rejection
from lightning_cnn.plot._style import figure


def rejection_curve(scores: Mapping[str, Scores], *, most: float = 0.9) -> Figure:
    """Accuracy on the pictures that are left, up to `most` of them refused (the last few say nothing)."""
    made, (axes,) = figure(6.5, 4.2)
    for name, one in scores.items():
        rejected, accuracy = accuracy_by_rejection(one.confidence.cpu(), one.correct.cpu())
        shown = rejected <= most
        axes.plot(rejected[shown], accuracy[shown], lw=1.8, label=f"{name}: {accuracy[0]:.3f} with all")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="refused, least confident first", ylabel="accuracy on the rest", xlim=(0, most))
    axes.grid(color="0.92")
    axes.legend(frameon=False, loc="lower right")
    return made
