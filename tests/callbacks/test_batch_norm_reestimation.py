"""Statistics of the weights that are there."""

import pytest
import torch
from _transfer import Module, fit, loader
from torch import nn

from lightning_cnn.callbacks import EMA, BatchNormReestimation
from lightning_cnn.errors import ConfigurationError, NoEffectWarning


def stem_statistics(module, data):
    with torch.no_grad():
        pixels = torch.cat([module.model.stem[0](images) for images, _ in data]).transpose(0, 1).flatten(1)
    return pixels.mean(1), pixels.var(1)


def test_statistics_are_those_of_all_pixels_under_the_final_weights():
    module = Module(lr=0.5)
    fit(module, BatchNormReestimation())
    mean, variance = stem_statistics(module, loader())
    torch.testing.assert_close(module.model.stem[1].running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.model.stem[1].running_var, variance, rtol=1e-4, atol=1e-5)


def test_after_ema_it_measures_the_averaged_weights():
    module = Module(lr=0.5)
    fit(module, EMA(decay=0.9), BatchNormReestimation())
    torch.testing.assert_close(module.model.stem[1].running_mean, stem_statistics(module, loader())[0], rtol=1e-4, atol=1e-5)


def test_before_ema_it_is_refused():
    with pytest.raises(ConfigurationError, match="put it after"):
        fit(Module(), BatchNormReestimation(), EMA())


def test_weights_modes_and_counters_are_left_alone():
    plain, ours = Module(), Module()
    fit(plain)
    fit(ours, BatchNormReestimation(batches=2))
    changed = [n for n, tensor in ours.state_dict().items() if not torch.equal(tensor, plain.state_dict()[n])]
    assert changed == [n for n in ours.state_dict() if "running" in n]
    assert all(m.training for m in ours.modules()) and not any(m._forward_pre_hooks for m in ours.modules())


def test_a_network_without_statistics_is_said():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    with pytest.warns(NoEffectWarning, match="no layer keeps"):
        fit(Module(net=net), BatchNormReestimation(), epochs=1)


def test_no_batches_are_refused():
    with pytest.raises(ConfigurationError, match="at least 1"):
        BatchNormReestimation(batches=0)
