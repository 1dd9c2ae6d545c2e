"""A picture of `lightning_cnn.conv.report`: what each pass of each layer costs, and with which algorithm."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_cnn.plot._style import COLOURS, figure

GREY = "#9a9a9a"
NAMES = ("winograd4", "depthwise", "winograd2", "layout", "im2col", "fft", "fft_tiled")


def conv_report(rows: Sequence[Any]) -> Figure:
    """Bars of milliseconds by layer and pass; behind each, in outline, what the default would take.

    `rows` have `layer`, `shape`, `role`, `algorithm`, `seconds` and `speedup`, as `Report.rows` has; those without a time are left out.
    Where a layer has met pictures of several shapes, its bars say which.
    """
    timed = [row for row in rows if row.seconds]
    several = Counter((row.layer, row.role) for row in timed)
    names = [f"{row.layer} {row.role}" + f" {row.shape.split()[0]}" * (several[row.layer, row.role] > 1) for row in timed]
    colours = {"default": GREY, **dict(zip(NAMES, COLOURS, strict=False))}
    made, (axes,) = figure(8, 1.5 + 0.22 * len(timed))
    for place, row in enumerate(timed):
        axes.barh(place, 1e3 * row.seconds * row.speedup, fill=False, edgecolor="#b0b0b0")
        axes.barh(place, 1e3 * row.seconds, color=colours.get(row.algorithm, "black"))
        if row.algorithm != "default":
            axes.text(1e3 * row.seconds * row.speedup, place, f" {row.speedup:.1f}x", va="center", fontsize=7)
    axes.set_yticks(range(len(timed)), names, fontsize=7)
    axes.set_ylim(len(timed) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.set_xlabel("milliseconds (outline: default)")
    used = dict.fromkeys(row.algorithm for row in timed)
    if used:
        handles = [Patch(color=colours.get(name, "black"), label=name) for name in used]
        axes.legend(handles=handles, frameon=False, fontsize=8, ncols=len(used), loc="lower left", bbox_to_anchor=(0, 1))
    return made
