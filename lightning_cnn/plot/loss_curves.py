"""Losses of runs that differ in one thing."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_cnn.plot._style import figure


def loss_curves(runs: Mapping[str, Sequence[float] | Sequence[Sequence[float]]], *, smooth: int = 10) -> Figure:
    """One line a run, on a logarithmic axis, averaged over `smooth` steps; several seeds of a run are a line and a band.

    `loss_curves({"nearest": losses, "stochastic": [losses_of_seed_0, losses_of_seed_1]})`
    """
    made, (axes,) = figure()
    for name, losses in runs.items():
        seeds = np.atleast_2d(np.asarray(losses, dtype=float))
        window = max(1, min(smooth, seeds.shape[1]))
        curves = np.stack([np.convolve(seed, np.ones(window) / window, "valid") for seed in seeds])
        steps = np.arange(curves.shape[1]) + window
        (line,) = axes.plot(steps, curves.mean(0), label=name)
        if len(curves) > 1:
            axes.fill_between(steps, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.2, lw=0)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.legend(frameon=False)
    return made
