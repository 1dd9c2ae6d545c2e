"""Where a network spends its arithmetic and memory, and how far each layer sees."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from lightning_cnn.plot._style import COLOURS, figure


def architecture_chart(rows: Sequence[Any], *, picture_px: int | None = None) -> Figure:
    """Bars by layer: multiply-adds, activations, receptive field (height; a grey line at the picture's `picture_px`).

    `rows` are those of `lightning_cnn.nn.architecture(...)`; layers that multiply nothing are left out.
    """
    shown = [row for row in rows if row.multiply_adds]
    made, axes = figure(10, 1.2 + 0.2 * max(len(shown), 3), 1, 3, sharey=True)
    fields = [row.seen[0].size if row.seen else 0 for row in shown]
    columns = (
        ("multiply-adds (millions)", [row.multiply_adds / 1e6 for row in shown]),
        ("activations (MiB)", [row.activation_bytes / 2**20 for row in shown]),
        ("receptive field (pixels)", fields),
    )
    for ax, (title, values), colour in zip(axes, columns, COLOURS, strict=False):
        ax.barh(range(len(shown)), values, color=colour)
        ax.set_xlabel(title)
        ax.grid(axis="x", color="0.92")
        ax.set_axisbelow(True)
    if picture_px:
        axes[2].axvline(picture_px, color="0.6", lw=1)
    axes[0].set_yticks(range(len(shown)), [row.name for row in shown], fontsize=7)
    axes[0].invert_yaxis()
    return made
