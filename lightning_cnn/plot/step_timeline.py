"""Where the time of each step went, stacked over the run."""

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lightning_cnn.plot._style import COLOURS, figure


def step_timeline(stages: Mapping[str, Sequence[float]], *, width: int = 1, title: str = "") -> Figure:
    """Seconds a step by stage, stacked; each value is the mean of `width` steps. Stages that cost nothing are left out."""
    made, (axes,) = figure(8.0, 4.0)
    shown = {name: [1e3 * value for value in values] for name, values in stages.items() if sum(values) > 0}
    steps = len(next(iter(shown.values()), ()))
    edges = [width * i for i in range(steps + 1)]
    below = [0.0] * steps
    palette = (*COLOURS, "#999999")
    for colour, (name, values) in zip(palette, shown.items(), strict=False):
        above = [low + value for low, value in zip(below, values, strict=True)]
        axes.stairs(above, edges, baseline=below, fill=True, color=colour, label=f"{name} {sum(values) / steps:.2f} ms")
        below = above
    axes.set(xlabel="step", ylabel="milliseconds")
    axes.set_title(textwrap.fill(title, 110), fontsize=8, loc="left")
    axes.legend(
        *(part[::-1] for part in axes.get_legend_handles_labels()), frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1)
    )
    return made
