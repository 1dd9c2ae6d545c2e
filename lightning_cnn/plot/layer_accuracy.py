"""What each layer knows: accuracy of linear probes from stem to top."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_cnn.plot._style import COLOURS, figure


def layer_accuracy(layers: Sequence[str], curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, chance: float) -> Figure:
    """One line a number of training pictures: (means, standard errors) at each layer; a grey line where guessing would be."""
    made, (axes,) = figure(1.1 * len(layers) + 2.5, 4.2)
    x = np.arange(len(layers))
    for colour, (name, (means, errors)) in zip(COLOURS, curves.items(), strict=False):
        axes.errorbar(x, means, yerr=errors, marker="o", ms=4, capsize=2, color=colour)
        axes.annotate(f" {name}", (x[-1], means[-1]), color=colour, va="center", fontsize=9, xytext=(4, 0), textcoords="offset points")
    axes.axhline(chance, color="0.7", lw=1, zorder=0)
    axes.text(x[0], chance, "chance", color="0.5", fontsize=8, va="bottom")
    axes.set_xticks(x, layers, rotation=20, ha="right")
    axes.set_xlim(-0.3, len(layers) - 1 + 0.9)
    axes.set_ylabel("accuracy of a linear probe")
    axes.grid(axis="y", color="0.92")
    return made
