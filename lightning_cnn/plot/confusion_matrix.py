"""Which classes are taken for which."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from lightning_cnn.plot._style import figure

MOST_WITH_NUMBERS = 20


def confusion_matrix(counts: ArrayLike, classes: Sequence[str]) -> Figure:
    """Rows are the truth, columns the answer; colour is the share of the row, numbers are counts (up to 20 classes)."""
    table = np.asarray(counts)
    n = len(classes)
    if table.shape != (n, n):
        raise ValueError(f"confusion_matrix needs {n}x{n} counts for {n} classes; got shape {table.shape}.")
    side = min(12.0, max(4.0, 0.45 * n + 1.6))
    made, (axes,) = figure(side + 0.8, side)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    made.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    step = max(1, n // 40)
    axes.set_xticks(range(0, n, step), list(classes)[::step], rotation=90 if max(map(len, classes)) > 2 else 0)
    axes.set_yticks(range(0, n, step), list(classes)[::step])
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    axes.set_title(f"accuracy {np.trace(table) / max(table.sum(), 1):.3f}, n = {table.sum():,}")
    if n <= MOST_WITH_NUMBERS:
        for (row, column), count in np.ndenumerate(table):
            if count:
                axes.text(
                    column,
                    row,
                    f"{count:g}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if share[row, column] > 0.5 else "black",
                )
    return made
