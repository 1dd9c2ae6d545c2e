"""Pictures and those that a network finds most alike."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_cnn.plot._style import COLOURS, figure


def neighbours(queries: Sequence[np.ndarray], found: Sequence[Sequence[np.ndarray]], agree: Sequence[Sequence[bool]]) -> Figure:
    """A row a query: the picture, then its nearest neighbours; a green frame where the neighbour is of the query's class, else red."""
    columns = 1 + max(len(row) for row in found)
    made, axes = figure(1.1 * columns, 1.15 * len(queries), len(queries), columns)
    for ax in axes:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[["top", "right", "bottom", "left"]].set_visible(False)
    for row, (query, pictures, same) in enumerate(zip(queries, found, agree, strict=True)):
        axes[row * columns].imshow(query)
        for column, (picture, fits) in enumerate(zip(pictures, same, strict=True), 1):
            ax = axes[row * columns + column]
            ax.imshow(picture)
            ax.spines[["top", "right", "bottom", "left"]].set(visible=True, color=COLOURS[2] if fits else COLOURS[3], linewidth=2.5)
    axes[0].set_title("picture", fontsize=9)
    axes[1].set_title("nearest in the training set", fontsize=9, loc="left")
    return made
