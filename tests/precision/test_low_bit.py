"""LowBit lowers layers in place, trains, and resumes to the bit."""

import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.errors import ConfigurationError, NoEffectWarning, UnsupportedLayerError
from lightning_cnn.nn.low_bit import LowBitConv2d
from lightning_cnn.precision import LowBit

WIDTHS = [(1, 1), (1, None), (2, 2), (4, 4), (None, 1), (3, None)]


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(6 * 16, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


def loader():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) * 9).long().clamp(0, 2)), 8)


def fit(plugin, epochs, net=None, **options):
    torch.manual_seed(3)
    net = net or Net()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, plugins=[plugin] if plugin else None, **quiet)
    trainer.fit(net, loader(), **options)
    return net, trainer


def lowered(net):
    return [name for name, module in net.named_modules() if hasattr(module, "bits")]


def test_layers_between_the_ends_are_lowered_in_place_and_once():
    net = Net()
    before, keys, weights = dict(net.named_modules()), list(net.state_dict()), [id(p) for p in net.parameters()]
    plugin = LowBit(weights=1, activations=1)
    assert plugin.convert_module(net) is net
    once = [type(module) for module in net.modules()]
    plugin.convert_module(net)
    assert [type(module) for module in net.modules()] == once
    assert lowered(net) == ["net.3", "net.7"]
    assert all(before[name] is module for name, module in net.named_modules())
    assert list(net.state_dict()) == keys and [id(p) for p in net.parameters()] == weights
    assert not any(type(module) is nn.ReLU for module in net.modules())


@pytest.mark.parametrize(("weights", "activations"), WIDTHS)
def test_what_the_layer_multiplies_has_few_values(weights, activations):
    net = Net()
    LowBit(weights=weights, activations=activations, keep=()).convert_module(net)
    layer = net.net[3]
    values, _ = layer.quantized_weight()
    inputs = layer.quantized_input(torch.randn(2, 6, 4, 4))
    for tensor, bits in ((values, weights), (inputs, activations)):
        assert bits is None or tensor.unique().numel() <= max(2**bits, 2) - (bits == 2)


def test_the_scale_leaves_sums_of_signs_exact():
    """Scaling the output keeps every sum an integer; the result equals scaled weights within float32 rounding."""
    layer = nn.Conv2d(6, 5, 3, padding=1)
    holder = nn.Sequential(layer)
    LowBit(keep=()).convert_module(holder)
    x = torch.randn(2, 6, 4, 4)
    weight, scale = layer.quantized_weight()
    signs = torch.where(x < 0, -1.0, 1.0)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(signs, weight * scale.view(-1, 1, 1, 1), layer.bias, padding=1))
    sums = nn.functional.conv2d(signs, weight, padding=1)
    assert torch.equal(sums, sums.round())


@pytest.mark.parametrize(("weights", "activations"), WIDTHS)
def test_a_resumed_run_is_the_uninterrupted_run(weights, activations, tmp_path):
    def plugin():
        return LowBit(weights=weights, activations=activations)

    whole, _ = fit(plugin(), 2)
    _, first = fit(plugin(), 1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(plugin(), 2, net=Net(), ckpt_path=tmp_path / "half.ckpt")
    different = [n for (n, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True) if not torch.equal(p, q)]
    assert different == []


def test_checkpoints_move_between_plain_and_lowered_models(tmp_path):
    plain, plain_trainer = fit(None, 1)
    plain_trainer.save_checkpoint(tmp_path / "plain.ckpt")
    binary, trainer = fit(LowBit(), 2, net=Net(), ckpt_path=tmp_path / "plain.ckpt")
    assert trainer.global_step == 6 and list(binary.state_dict()) == list(plain.state_dict())
    trainer.save_checkpoint(tmp_path / "binary.ckpt")
    fit(None, 3, net=Net(), ckpt_path=tmp_path / "binary.ckpt")
    k_bits, _ = fit(LowBit(weights=4, activations=4), 1)
    assert list(k_bits.state_dict()) == list(plain.state_dict())
    Net().load_state_dict(k_bits.state_dict())
    k_bits.load_state_dict(plain.state_dict())


def test_latent_weights_stay_where_the_estimator_hears_them():
    net = Net()
    with torch.no_grad():
        net.net[3].weight.mul_(10)
    net, _ = fit(LowBit(), 1, net=net)
    assert net.net[3].weight.abs().max() == 1


def test_learned_steps_learn():
    net, trainer = fit(LowBit(weights=4, activations=4), 2)
    start = Net()
    LowBit(weights=4, activations=4).convert_module(start)
    steps, starts = (dict(m.named_parameters())["net.3.input_step"] for m in (net, start))
    assert steps != starts
    assert set(trainer.precision_plugin.state_dict()["steps"]) == {f"net.{i}.{s}_step" for i in (3, 7) for s in ("weight", "input")}


def test_signs_that_carry_nothing_are_reported():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    LowBit(relu="keep").convert_module(net)
    with pytest.warns(UserWarning, match="LowBitConv2d with W1A1 sees no negative input"):
        net(torch.randn(1, 1, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.randn(1, 1, 4, 4))


def test_all_wrong_arguments_are_listed_at_once():
    with pytest.raises(ConfigurationError, match=r"3 problems:\n.*weights must.*got 9.*\n.*'sharp'.*\n.*keep.*\['middle'\]"):
        LowBit(weights=9, ste="sharp", keep=("middle",))
    with pytest.raises(ConfigurationError, match="both None"):
        LowBit(weights=None, activations=None)


def test_a_name_that_is_no_layer_is_refused():
    with pytest.raises(UnsupportedLayerError, match=r"skip names 'net.1'.*it has net.0, net.3, net.7, net.9"):
        LowBit(skip=("net.1",)).convert_module(Net())


def test_a_model_with_nothing_to_lower_is_reported():
    with pytest.warns(NoEffectWarning, match="LowBit lowered no layer: the model has 2"):
        LowBit().convert_module(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))


def test_the_layer_type_is_public():
    net = Net()
    LowBit().convert_module(net)
    assert isinstance(net.net[3], LowBitConv2d) and isinstance(net.net[3], nn.Conv2d)
