"""A learning-rate range test on paper."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from lightning_cnn.plot._style import COLOURS, figure


def lr_range(rates: Sequence[float], losses: Sequence[float], *, suggestion: float | None = None) -> Figure:
    """Loss over the learning rate (logarithmic), and the suggested rate as a dot with its value."""
    made, (axes,) = figure(6.5, 4.0)
    axes.plot(rates, losses, color=COLOURS[0])
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss, smoothed")
    axes.grid(color="0.92")
    if suggestion is not None:
        nearest = min(range(len(rates)), key=lambda i: abs(rates[i] - suggestion))
        axes.plot(rates[nearest], losses[nearest], "o", color=COLOURS[3])
        axes.annotate(
            f"{suggestion:.2g}", (rates[nearest], losses[nearest]), xytext=(8, 8), textcoords="offset points", color=COLOURS[3]
        )
    return made
