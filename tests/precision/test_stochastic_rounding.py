"""What is special to weights in bfloat16; what every precision plugin promises is in test_contract."""

from contextlib import nullcontext

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


def step(model, x, context):
    """The output of a forward pass in this context, and the gradients."""
    with context:
        output = model(x)
    output.float().square().mean().backward()
    return output.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture
def no_units(monkeypatch):
    monkeypatch.setattr(stochastic_rounding, "bf16_units", lambda device: False)
    monkeypatch.setattr(stochastic_rounding, "fp16_units", lambda device: False)


class Layers(nn.Module):
    """Every way a weight is used: layers of all kinds, a parameter of the module's own, a layer's weight in a function, one that recurs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.up = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 8, 2)
        self.slope, self.bias, self.linear = nn.PReLU(8), nn.Parameter(torch.randn(8)), nn.Linear(8, 8, bias=False)
        self.table, self.attention, self.memory = nn.Embedding(2, 8), nn.MultiheadAttention(8, 2), nn.LSTM(8, 8)

    def forward(self, x):
        x = self.slope(self.up(self.norm(self.conv(x)))).mean(3).permute(2, 0, 1) + self.bias
        x = torch.nn.functional.linear(x, self.linear.weight) + self.table(torch.ones((), dtype=torch.int64))
        return self.memory(self.attention(x, x, x)[0])[0]


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_a_cpu_without_units_for_the_format_computes_in_float32(format, no_units):
    """The outputs are a float32 model's of the same weights, to the bit; the gradients are its, each rounded to the nearest."""
    low, full, x = Layers(), Layers(), torch.randn(2, 3, 6, 6)
    plugin = StochasticRounding(format=format)
    plugin.convert_module(low)
    full.load_state_dict(low.state_dict())
    expected, gradients = step(full, x, nullcontext())
    output, rounded = step(low, x, plugin.forward_context())
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)
    assert rounded["conv.weight"].dtype == low.conv.weight.dtype
    once = [name for name in rounded if not name.startswith("memory")]  # what recurs adds up gradients that are rounded already
    assert [name for name in once if not torch.equal(rounded[name], gradients[name].to(rounded[name].dtype))] == []


def test_a_cpu_with_units_for_the_format_computes_in_it(monkeypatch):
    monkeypatch.setattr(stochastic_rounding, "bf16_units", lambda device: True)
    plugin, layer = StochasticRounding(), nn.Linear(2, 2)
    plugin.convert_module(layer)
    assert step(layer, torch.randn(1, 2), plugin.forward_context())[0].dtype == torch.bfloat16


def test_compiled_it_computes_in_float32_too(no_units):
    """With autograd traced as well; inductor's own sums are not the point."""
    x, plugin = torch.randn(2, 3, 6, 6), StochasticRounding()
    eager, model = (plugin.convert_module(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))) for _ in range(2))
    model.load_state_dict(eager.state_dict())
    output, gradients = step(eager, x, plugin.forward_context())
    model.compile(backend="aot_eager")
    compiled, traced = step(model, x, plugin.forward_context())
    assert compiled.dtype == torch.float32
    assert torch.equal(compiled, output)
    assert all(torch.equal(traced[name], gradients[name]) for name in gradients)


def test_layers_to_keep_stay_in_float32():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.LayerNorm(2))
    StochasticRounding(keep=["1*"]).convert_module(model)
    assert [parameter.dtype for parameter in model.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 4
