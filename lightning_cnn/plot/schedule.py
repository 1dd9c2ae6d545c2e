"""Learning rates and frozen spans, step by step."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_cnn.plot._style import figure


def schedule(rates: Mapping[str, Sequence[float]], *, steps: Sequence[int] | None = None, xlabel: str = "step") -> Figure:
    """The learning rate of each parameter group, on a logarithmic axis; where a rate is zero the group is drawn as frozen."""
    made, (axes,) = figure(7, 3.5)
    positive = [rate for values in rates.values() for rate in values if rate > 0]
    floor = min(positive, default=1e-4) / 3
    for name, values in rates.items():
        rate = np.asarray(values, dtype=float)
        x = np.arange(len(rate)) if steps is None else np.asarray(steps)
        (line,) = axes.plot(x, np.where(rate > 0, rate, np.nan), label=name)
        axes.plot(x[:-1], np.where(rate > 0, np.nan, floor)[:-1], color=line.get_color(), ls=":", lw=2)
    if any(rate <= 0 for values in rates.values() for rate in values[:-1]):  # a schedule may end at zero
        axes.plot([], [], color="0.4", ls=":", lw=2, label="frozen")
    axes.set_yscale("log")
    axes.set(xlabel=xlabel, ylabel="learning rate")
    axes.legend(frameon=False, fontsize=8)
    return made
