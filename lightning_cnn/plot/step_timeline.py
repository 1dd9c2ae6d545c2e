"""Where the time of each step went, stacked over the run."""

import textwrap
from collections.abc import Mapping, Sequence
from statistics import median

from matplotlib.figure import Figure

from lightning_cnn.plot._style import COLOURS, figure

WORK = {"forward": "#BDBDBD", "backward": "#969696", "optimizer": "#737373"}  # what the time should go to stands back
TALLEST = 3.0  # medians of a step; above that a bar is cut, lest one stall flatten the picture


def step_timeline(stages: Mapping[str, Sequence[float]], *, width: int = 1, title: str = "") -> Figure:
    """Seconds a step by stage, stacked; each value is the mean of `width` steps. Stages that cost nothing are left out.

    The network's own work is grey, all else has a colour of its own, the same in every picture.
    """
    made, (axes,) = figure(9.0, 4.0)
    waits = [name for name in stages if name not in WORK]
    colours = WORK | dict(zip(waits, COLOURS * (1 + len(waits) // len(COLOURS)), strict=False))
    shown = {name: [1e3 * value for value in values] for name, values in stages.items() if sum(values) > 0}
    steps = len(next(iter(shown.values()), ()))
    total = [sum(values) for values in zip(*shown.values(), strict=True)]
    below = [0.0] * steps
    for name, values in shown.items():
        above = [low + value for low, value in zip(below, values, strict=True)]
        label = f"{name}  {sum(values) / steps:.2f} ms, {sum(values) / sum(total):.0%}"
        axes.stairs(above, [width * i for i in range(steps + 1)], baseline=below, fill=True, color=colours[name], label=label)
        below = above
    axes.set(xlabel="step", ylabel="milliseconds a step", xlim=(0, width * steps or 1))
    axes.set_title(textwrap.fill(title, 108), fontsize=10, loc="left", pad=12)
    axes.legend(
        *(part[::-1] for part in axes.get_legend_handles_labels()), frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1)
    )
    if total and max(total) > TALLEST * median(total):
        axes.set_ylim(0, TALLEST * median(total))
        axes.annotate(
            f"cut; the longest took {max(total):,.0f} ms", (1, 1), (0, 2), "axes fraction", "offset points", fontsize=8, ha="right"
        )
    return made
