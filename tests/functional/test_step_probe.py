"""The probe counts what runs and finds the line that reads a value back."""

import inspect

import torch
from torch import nn

from lightning_cnn.functional.roofline import roofline
from lightning_cnn.functional.step_probe import StepProbe


def test_a_training_step_of_a_convolution_is_three_times_its_forward_pass():
    conv, image = nn.Conv2d(3, 8, 3), torch.rand(2, 3, 10, 10, requires_grad=True)
    forward = 2 * 2 * 8 * 64 * 27
    with StepProbe() as probe:
        conv(image).sum().backward()
    assert probe.flops == {torch.float32: 3 * forward}
    assert 4 < probe.operations < 20


def test_it_computes_the_same():
    torch.manual_seed(0)
    layer, image = nn.Linear(4, 4), torch.rand(3, 4)
    with StepProbe():
        watched = layer(image)
    assert torch.equal(watched, layer(image))


def test_reads_are_found_with_their_line_and_their_loop():
    values = torch.rand(50)
    with StepProbe() as probe:
        once = values.sum().item()
        line = inspect.currentframe().f_lineno - 1
        several = [float(value) for value in values]
    assert (once, len(several)) != (None, 0)
    assert probe.reads[f"test_step_probe.py:{line}"].values == 1
    loop = probe.reads[f"test_step_probe.py:{line + 2}"]
    assert loop.values == 50


def test_reads_elsewhere_are_not_the_step_s():
    with StepProbe(reading=lambda: False) as probe:
        torch.rand(1).item()
    assert probe.reads == {}


def test_the_roofline_is_a_plausible_machine_and_is_measured_once():
    found = roofline("cpu")
    assert found.flops_per_s > 1e8 and found.bytes_per_s > 1e8 and 1e-8 < found.operation_s < 1e-2
    assert roofline(torch.device("cpu")) is found
