"""Pictures with a line of text under each."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_cnn.plot._style import figure


def picture_grid(
    pictures: Sequence[np.ndarray], captions: Sequence[str], *, columns: int = 6, colours: Sequence[str] | None = None
) -> Figure:
    """Pictures (h w) or (h w 3), uint8 or in [0, 1], in reading order; `colours` of the captions, black when none are given."""
    columns = min(columns, max(1, len(pictures)))
    rows = -(-len(pictures) // columns) or 1
    made, axes = figure(1.7 * columns, 2.0 * rows, rows, columns)
    for ax in axes:
        ax.axis("off")
    for position, (ax, picture, caption) in enumerate(zip(axes, pictures, captions, strict=False)):
        ax.imshow(picture, cmap="gray", interpolation="nearest" if picture.shape[0] < 64 else None)
        ax.set_title(caption, fontsize=8, color=colours[position] if colours else "black", y=-0.02, va="top")
    return made
