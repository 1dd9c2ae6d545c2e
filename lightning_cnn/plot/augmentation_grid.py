"""Training pictures, each beside what the augmentation makes of it in the first epochs."""

from typing import Protocol

from matplotlib.figure import Figure

from lightning_cnn.functional.batch import Batch
from lightning_cnn.plot._style import figure


class Augments(Protocol):
    def at_epoch(self, batch: Batch, epoch: int) -> Batch: ...


def augmentation_grid(augmentation: Augments, batch: Batch, *, epochs: int = 8) -> Figure:
    """One row a picture of `batch` (uint8, or floats in [0, 1]): as loaded, and as training sees it in each of `epochs`."""
    columns = [batch, *(augmentation.at_epoch(batch, epoch) for epoch in range(epochs))]
    titles = ["as loaded", *(f"epoch {epoch}" for epoch in range(epochs))]
    rows = len(batch.image)
    made, axes = figure(1.2 * len(columns), 1.25 * rows + 0.2, rows, len(columns))
    for place, ax in enumerate(axes):
        row, column = divmod(place, len(columns))
        picture = columns[column].image[row].float().cpu() / (1 if batch.image.is_floating_point() else 255)
        ax.imshow(picture.clamp(0, 1).movedim(0, -1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(column == 0)
        ax.spines[:].set_linewidth(2)
        if row == 0:
            ax.set_title(titles[column], fontsize=8)
    return made
