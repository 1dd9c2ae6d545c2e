"""What every precision plugin promises, checked on one table of plugins: add a row and it is held to all of it."""

from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.precision import BinaryNet, FixedPoint, LowBit, StochasticRounding


def bfloat16_except_norms(name: str, weight: Tensor) -> bool:
    return weight.dtype == (torch.float32 if "norm" in name else torch.bfloat16)


def fixed_point_except_norms(name: str, weight: Tensor) -> bool:
    return "norm" in name or bool((weight * 1024 == (weight * 1024).round()).all() and weight.abs().max() <= 32)


def latent_within_one(name: str, weight: Tensor) -> bool:
    return "middle" not in name or bool(weight.abs().max() <= 1)


@dataclass(frozen=True)
class Case:
    """A plugin, and what its parameters look like between steps: `on_grid(name, parameter)`."""

    make: Callable[[], L.pytorch.plugins.precision.Precision]
    on_grid: Callable[[str, Tensor], bool]


CASES = {
    "stochastic_rounding": Case(lambda: StochasticRounding(seed=3), bfloat16_except_norms),
    "stochastic_rounding_8bit_states": Case(lambda: StochasticRounding(seed=3, states="8bit", bucket_mib=1e-3), bfloat16_except_norms),
    "fixed_point": Case(lambda: FixedPoint(seed=3), fixed_point_except_norms),
    "binary_net": Case(BinaryNet, latent_within_one),
    "low_bit_ternary": Case(lambda: LowBit(weights=2, activations=2), latent_within_one),
}
each_plugin = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Net(L.LightningModule):
    """Convolution, norm, convolution, norm, linear: a first, a middle and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 16, 3, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.norm(self.conv(x)))
        return self.head(F.hardtanh(self.norm2(self.middle(x))).mean((2, 3)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).float(), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def loader() -> DataLoader:
    noise = torch.Generator().manual_seed(1)
    label = torch.arange(64) % 4
    image = torch.randn(64, 1, 8, 8, generator=noise) + label.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(image, label), 16)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def trainer(plugin, epochs: int = 1, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(max_epochs=epochs, accelerator="cpu", plugins=plugin, **(quiet | options))


def fit(plugin, epochs: int = 1, model: Net | None = None, **options) -> Net:
    model = model or net()
    trainer(plugin, epochs, gradient_clip_val=1.0, **options).fit(model, loader())
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@each_plugin
def test_parameters_lie_on_the_declared_grid_after_training(case):
    off = [name for name, weight in fit(case.make()).named_parameters() if not case.on_grid(name, weight)]
    assert off == []


@each_plugin
def test_training_moves_every_parameter(case):
    plugin, model = case.make(), net()
    start = plugin.convert_module(net()).state_dict()
    fit(plugin, 2, model)
    assert [name for name, weight in model.named_parameters() if torch.equal(weight, start[name])] == []


@each_plugin
def test_convert_module_works_in_place_and_a_second_time_changes_nothing(case):
    plugin, model = case.make(), net()
    parameters = list(model.parameters())
    assert plugin.convert_module(model) is model
    once = {name: value.clone() for name, value in model.state_dict().items()}
    assert plugin.convert_module(model) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())


@each_plugin
def test_checkpoints_of_a_plain_model_load_under_the_plugin_and_back(case, tmp_path):
    plain = trainer(None)
    plain.fit(net(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    under = trainer(case.make(), 2)
    under.fit(net(1), loader(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    under.save_checkpoint(tmp_path / "under.ckpt")
    model = net(2)
    assert list(torch.load(tmp_path / "under.ckpt", weights_only=True)["state_dict"]) == list(model.state_dict())
    trainer(None, 3).fit(model, loader(), ckpt_path=tmp_path / "under.ckpt", weights_only=True)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


@each_plugin
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_never_interrupted(case, tmp_path):
    whole = fit(case.make(), 3)
    first = trainer(case.make(), 1, gradient_clip_val=1.0)
    first.fit(net(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = net(5)
    trainer(case.make(), 3, gradient_clip_val=1.0).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same(whole, resumed)


@each_plugin
def test_gradient_hooks_still_fire_after_a_step(case):
    """Re-typing a parameter's data drops its gradient accumulator, and with it DDP's hook."""
    fired = []

    class Hooked(Net):
        def on_train_start(self) -> None:
            accumulator = self.middle.weight.view_as(self.middle.weight).grad_fn.next_functions[0][0]
            self.kept = accumulator
            accumulator.register_hook(lambda *_: fired.append(self.trainer.global_step))

    torch.manual_seed(0)
    fit(case.make(), 1, Hooked())
    assert fired == [0, 1, 2, 3]


class Difference(L.Callback):
    """Writes the largest difference between the two ranks' parameters."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer, *_) -> None:
        torch.rand(1 + 3 * trainer.global_rank)  # the ranks' own generators drift apart

    def on_train_end(self, trainer, module) -> None:
        weights = torch.cat([p.detach().float().flatten() for p in module.parameters()])
        ranks = trainer.strategy.all_gather(weights)
        if trainer.global_rank == 0:
            self.path.write_text(repr((ranks[0] - ranks[1]).abs().max().item()))


@pytest.mark.forks
@each_plugin
def test_two_ranks_stay_bit_identical(case, tmp_path):
    fit(case.make(), strategy="ddp_fork", devices=2, callbacks=[Difference(tmp_path / "difference")])
    assert (tmp_path / "difference").read_text() == "0.0"


@each_plugin
def test_accumulated_batches_take_one_step(case):
    plugin, model = case.make(), net()
    fit(plugin, 1, model, accumulate_grad_batches=4)
    assert model.trainer.global_step == 1
    assert [name for name, weight in model.named_parameters() if not case.on_grid(name, weight)] == []
