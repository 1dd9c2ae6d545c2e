"""The chart has a bar for every layer that multiplies, in the order they ran."""

import torch
from torch import nn

from lightning_cnn.nn import architecture
from lightning_cnn.plot import architecture_chart


def test_one_bar_a_layer_that_multiplies():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2))
    axes = architecture_chart(architecture(model, torch.rand(1, 3, 8, 8)).rows, picture_px=8).axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["0", "2", "4"]
    assert [bar.get_width() for bar in axes[2].patches] == [3, 5, 8]
    assert [bar.get_width() for bar in axes[0].patches] == [36 * 216 / 1e6, 16 * 576 / 1e6, 256 / 1e6]
