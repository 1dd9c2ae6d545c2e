"""One look for every figure: few lines, readable at thumbnail size, colours that survive colour blindness (Okabe and Ito)."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")


def figure(width: float = 7.0, height: float = 4.0, rows: int = 1, columns: int = 1, **options) -> tuple[Figure, list[Axes]]:
    """A Figure without pyplot's global state (safe in threads and servers), and its axes in reading order."""
    made = Figure(figsize=(width, height), layout="constrained", dpi=120)
    axes = made.subplots(rows, columns, squeeze=False, **options)
    return made, [plain(ax) for ax in axes.flat]


def plain(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_prop_cycle(color=COLOURS)
    return axes
