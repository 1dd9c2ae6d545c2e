"""What is special to fixed point; what every precision plugin promises is in test_contract."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_cnn.errors import ConfigurationError, NoEffectWarning
from lightning_cnn.precision import FixedPoint, courbariaux


class Net(L.LightningModule):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.first, self.last, self.gain = nn.Linear(4, 8), nn.Linear(8, 2), gain
        self.seen = []

    def training_step(self, batch, batch_idx):
        hidden = self.first(batch[0] * self.gain)
        self.seen += [hidden, self.last(hidden)]
        return self.seen[-1].square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def fit(module, plugin, **options):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 4)), 8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=1, accelerator="cpu", plugins=plugin, **(quiet | options)).fit(module, data)
    return module


def on_grid(x, fraction_bits):
    return bool((x * 2.0**fraction_bits == (x * 2.0**fraction_bits).round()).all())


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_everything_lies_on_the_grid(rounding):
    module = fit(Net(), FixedPoint(integer_bits=5, fraction_bits=7, rounding=rounding))
    assert len(module.seen) == 8  # two activations a step
    assert all(on_grid(value, 7) for value in [*module.seen, *module.parameters()])
    assert all(on_grid(parameter.grad, 7) for parameter in module.parameters() if parameter.grad is not None)


def test_gradients_of_activations_are_rounded_on_the_way_back():
    layer = nn.Linear(4, 4, bias=False)
    nn.init.eye_(layer.weight)
    FixedPoint(fraction_bits=3, of=["gradients"]).convert_module(layer)
    x = torch.randn(5, 4, requires_grad=True)
    y = layer(x)
    assert torch.equal(x, y)
    y.backward(torch.randn(5, 4))
    assert on_grid(x.grad, 3)


def test_only_what_is_asked_for_is_rounded():
    module = fit(Net(), FixedPoint(of=["weights"], fraction_bits=7))
    assert all(on_grid(parameter, 7) for parameter in module.parameters())
    assert not any(on_grid(value, 7) for value in module.seen)


def test_weights_below_half_a_step_stay_under_nearest_and_move_under_stochastic():
    moved = {}
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(1)
        module = Net()
        start = FixedPoint(fraction_bits=4).convert_module(Net().requires_grad_(False))
        start.load_state_dict(module.state_dict())
        FixedPoint(fraction_bits=4).convert_module(start)
        fit(module, FixedPoint(fraction_bits=4, of=["weights"], rounding=rounding))
        moved[rounding] = not torch.equal(start.first.weight, module.first.weight)
    assert moved == {"nearest": False, "stochastic": True}


def test_saturation_is_counted_a_layer_logged_and_warned_about(tmp_path):
    """Inputs 1000 times too large: what leaves the first layer does not fit in [-2, 2)."""
    logger = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"of activations/first lie outside <2,10>.*more integer_bits"):
        fit(Net(1000.0), FixedPoint(integer_bits=2, of=["activations"]), logger=logger, log_every_n_steps=2)
    logger.save()
    header, *rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    shares = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    assert float(shares["overflow/activations/first"]) > 0.9
    assert len(rows) == 2


def test_evaluation_rounds_to_the_nearest_and_the_hooks_leave_with_the_plugin():
    plugin, module = FixedPoint(fraction_bits=3), Net()
    plugin.convert_module(module)
    module.eval()
    x = torch.randn(2, 4)
    assert torch.equal(module.first(x), module.first(x))
    assert on_grid(module.first(x), 3)
    plugin.teardown()
    assert not on_grid(module.first(x), 3)


def test_a_forward_compiled_by_the_user_rounds_too():
    plugin, layer = FixedPoint(fraction_bits=3, of=["activations"]), nn.Linear(4, 2)
    plugin.convert_module(layer)
    assert on_grid(torch.compile(layer, backend="eager")(torch.randn(3, 4)), 3)


def test_courbariaux_gives_each_quantity_its_bits():
    module = fit(Net(), courbariaux())
    assert all(on_grid(parameter, 10) and parameter.abs().max() <= 2 for parameter in module.parameters())
    assert all(on_grid(value, 5) for value in module.seen)


def test_all_that_is_wrong_is_said_at_once():
    plugin = FixedPoint(integer_bits=0, of=["weights", "errors"], rounding="up", formats={"errors": (20, 20)})
    with pytest.raises(ConfigurationError, match="4 problems"):
        plugin.convert_module(nn.Linear(1, 1))


def test_a_model_without_layers_is_warned_about():
    with pytest.warns(NoEffectWarning):
        FixedPoint().convert_module(nn.BatchNorm2d(3))
