"""The picture of losses."""

import numpy as np
import pytest

from lightning_cnn.plot import loss_curves


def test_a_line_a_run_and_a_band_over_seeds():
    (axes,) = loss_curves({"nearest": [2.0] * 30, "stochastic": [np.geomspace(2, 0.1, 30), np.geomspace(2, 0.2, 30)]}).axes
    assert [line.get_label() for line in axes.lines] == ["nearest", "stochastic"]
    assert len(axes.collections) == 1
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_ydata() == pytest.approx([2.0] * 21)


def test_a_run_shorter_than_the_window_is_one_point():
    (axes,) = loss_curves({"short": [1.0, 2.0]}).axes
    assert axes.lines[0].get_ydata().tolist() == [1.5]
