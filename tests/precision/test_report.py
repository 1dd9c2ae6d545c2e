"""The report on a model's numbers."""

import torch
from torch import nn

from lightning_cnn.precision import StochasticRounding, report


def test_a_line_a_layer_with_its_format_bytes_and_a_total():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    StochasticRounding().convert_module(model)
    convolution, norm = report(model)
    assert (convolution.layer, convolution.format, convolution.numbers, convolution.nbytes) == ("0", "bf16", 216, 432)
    assert (norm.format, norm.nbytes, norm.smaller) == ("fp32", 64, 1.0)
    assert str(report(model)).splitlines()[-1].split() == ["total", "232", "496", "1.9x"]


def test_saturated_weights_of_a_declared_grid_are_counted():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[2.0 - 2**-6, -2.0, 0.5, 0.25]])
    (line,) = report(layer, {"": (2, 6)})
    assert (line.format, line.nbytes, line.saturated) == ("<2,6>", 4, 0.5)
