"""The report on a model's numbers."""

import copy

import torch
from torch import nn

from lightning_cnn.nn import pack
from lightning_cnn.precision import BinaryNet, LowBit, StochasticRounding, report


def test_a_line_a_layer_with_its_format_bytes_and_a_total():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    StochasticRounding().convert_module(model)
    convolution, norm = report(model)
    assert (convolution.layer, convolution.format, convolution.numbers, convolution.nbytes) == ("0", "bf16", 216, 432)
    assert (norm.format, norm.nbytes, norm.smaller) == ("fp32", 64, 1.0)
    assert str(report(model)).splitlines()[-1].split() == ["total", "232", "496", "1.9x", "-", "-", "-"]


def test_saturated_weights_of_a_declared_grid_are_counted():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[2.0 - 2**-6, -2.0, 0.5, 0.25]])
    (line,) = report(layer, {"": (2, 6)})
    assert (line.format, line.nbytes, line.saturated) == ("<2,6>", 4, 0.5)


def test_weights_that_flipped_and_latent_weights_at_the_estimators_end_are_counted():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[0.5, -0.5, 1.0, 0.1], [0.2, -1.0, 0.3, 0.4]])
    model = nn.Sequential(layer)
    BinaryNet(keep=()).convert_module(model)
    before = copy.deepcopy(model.state_dict())
    layer.weight.data[0, 0] *= -1
    layer.weight.data[1, 1] = 0.0
    (line,) = report(model, since=before)
    assert (line.format, line.nbytes, line.saturated, line.flipped) == ("W1A1", 32, 1 / 8, 2 / 8)
    assert layer.weight[0, 0] == -0.5, "the report changed the model"


def test_weights_beyond_the_steps_that_the_bits_can_count_are_saturated():
    layer = nn.Linear(4, 1, bias=False)
    LowBit(weights=3, activations=None, keep=()).convert_module(nn.Sequential(layer))
    with torch.no_grad():
        layer.weight_step.fill_(0.25)
        layer.weight.copy_(torch.tensor([[0.75, -1.0, 1.0, -1.2]]))  # 3, -4, 4 and -5 steps of -4 to 3
    (line,) = report(nn.Sequential(layer))
    assert (line.format, line.saturated, line.flipped) == ("W3A32", 0.5, None)


def test_packed_layers_are_timed_beside_their_originals():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 4, 3))
    BinaryNet().convert_module(model)
    x = torch.randn(2, 3, 16, 16)
    lines = {line.layer: line for line in report(pack(model.eval()), beside=(model, x))}
    assert lines["2"].format == "1 bit" and lines["2"].faster > 0
    assert lines["0"].faster is None and "x" in str(lines["2"].cells()[-1])
