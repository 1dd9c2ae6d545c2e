"""What is special to weights in bfloat16; what every precision plugin promises is in test_contract."""

import lightning as L
import pytest
import torch
from torch import nn

from lightning_cnn.errors import ConfigurationError, NoEffectWarning
from lightning_cnn.precision import StochasticRounding, stochastic_rounding


class Line(L.LightningModule):
    """One weight a unit, pulled by a constant gradient: SGD moves each by 1e-5 a step."""

    def __init__(self, optimizer=torch.optim.SGD, **options) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 512, bias=False)
        nn.init.ones_(self.layer.weight)
        self.optimizer, self.options = optimizer, options

    def training_step(self, batch, batch_idx):
        return -(self.layer.weight.float() - 1.0).sum() * 1.0

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.options)


def fit(module, plugin, steps=8, **options):
    data = torch.utils.data.DataLoader(torch.zeros(steps, 1))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=1, accelerator="cpu", plugins=plugin, **(quiet | options)).fit(module, data)
    return module


@pytest.mark.parametrize(("format", "spacing"), [("bf16", 2.0**-7), ("fp16", 2.0**-10)])
def test_tiny_updates_move_the_weights_on_average_and_vanish_when_rounded_to_nearest(format, spacing):
    """100 updates of 1/32 of the spacing on 512 weights: the mean moves by 100/32 of it; binomial standard error, |z| < 5 (6e-7)."""
    lost = fit(Line(lr=spacing / 32), StochasticRounding(format=format, rounding="nearest"), 100)
    assert torch.equal(lost.layer.weight.detach().float(), torch.ones(512, 1))
    kept = fit(Line(lr=spacing / 32), StochasticRounding(format=format), 100).layer.weight.detach().float() - 1
    error = spacing * (100 / 32 * (1 - 1 / 32) / 512) ** 0.5
    assert abs(kept.mean().item() - 100 / 32 * spacing) < 5 * error


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adafactor, {}),
    ],
    ids=["adamw-foreach", "adamw-fused", "sgd-fused", "rmsprop", "adafactor"],
)
def test_any_optimizer_steps_in_float32(optimizer, options):
    """The states are what float32 parameters would have given: the gradient is constant and exact in bfloat16.

    But for the last bit where Adam's step is ours.
    """
    low = fit(Line(optimizer, lr=1e-3, **options), StochasticRounding(bucket_mib=1e-3), 4)
    full = fit(Line(optimizer, lr=1e-3, **options), None, 4)
    states, expected = (module.trainer.optimizers[0].state[module.layer.weight] for module in (low, full))
    assert states.keys() == expected.keys()
    if optimizer is not torch.optim.Adafactor:  # whose states read the weights
        torch.testing.assert_close(dict(states), dict(expected), rtol=2 * 2.0**-23, atol=0)
    assert low.layer.weight.dtype == torch.bfloat16


def test_all_that_is_wrong_is_said_at_once():
    plugin = StochasticRounding(format="e4m3", states="4bit", rounding="up", bucket_mib=0, keep=["head"])
    with pytest.raises(ConfigurationError, match="5 problems") as error:
        plugin.convert_module(nn.Linear(1, 1))
    assert all(word in str(error.value) for word in ("held in 16 they would save nothing", "4bit", "up", "bucket_mib", "head"))


def test_an_optimizer_that_evaluates_the_model_is_refused():
    with pytest.raises(ConfigurationError, match="LBFGS evaluates the model several times"):
        fit(Line(torch.optim.LBFGS), StochasticRounding())


def test_a_model_of_norms_alone_is_warned_about():
    with pytest.warns(NoEffectWarning, match="no parameter"):
        StochasticRounding().convert_module(nn.BatchNorm2d(2))


@pytest.mark.parametrize(("format", "units", "told"), [("bf16", False, True), ("bf16", True, False), ("fp16", False, False)])
def test_who_computes_in_bfloat16_without_units_for_it_is_warned(format, units, told, monkeypatch, recwarn):
    monkeypatch.setattr(stochastic_rounding, "bf16_units", lambda device: units)
    fit(Line(lr=0.1), StochasticRounding(format=format), 1)
    assert any("no units for bfloat16" in str(warning.message) for warning in recwarn) == told


def test_layers_to_keep_stay_in_float32():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.LayerNorm(2))
    StochasticRounding(keep=["1*"]).convert_module(model)
    assert [parameter.dtype for parameter in model.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 4
