"""What every precision plugin promises, checked on one table of plugins: add a row and it is held to all of it."""

from collections.abc import Callable
from dataclasses import dataclass

import jaxtyping
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.callbacks import EMA
from lightning_cnn.functional.binary import lsq_range
from lightning_cnn.functional.weights import ema_decay
from lightning_cnn.precision import BinaryNet, FixedPoint, LowBit, StochasticRounding, bi_real, binary_connect, courbariaux, xnor_net


def held_in(dtype: torch.dtype) -> Callable[[nn.Module], list[str]]:
    def off_grid(model: nn.Module) -> list[str]:
        return [name for name, p in model.named_parameters() if p.dtype != (torch.float32 if "norm" in name else dtype)]

    return off_grid


def fixed_point(fraction_bits: int, largest: float) -> Callable[[nn.Module], list[str]]:
    def off_grid(model: nn.Module) -> list[str]:
        steps = {name: p * 2.0**fraction_bits for name, p in model.named_parameters() if "norm" not in name}
        return [name for name, n in steps.items() if not torch.equal(n, n.round()) or n.abs().max() > largest * 2**fraction_bits]

    return off_grid


def few_values(model: nn.Module) -> list[str]:
    """Layers that multiply other weights or inputs than their bits can count, or whose latent weights left the estimator's range."""
    lowered = {name: layer for name, layer in model.named_modules() if hasattr(layer, "bits")}
    return [name for name, layer in lowered.items() if not _has_few_values(layer)] if lowered else ["no layer is lowered"]


def _has_few_values(layer: nn.Module) -> bool:
    weight, bits = layer.quantized_weight()[0], layer.bits
    pairs = [
        (weight, bits.weights, "weight_step"),
        (layer.quantized_input(torch.randn(2, *weight.shape[1:])), bits.activations, "input_step"),
    ]
    few = all(bool(torch.isin(x, _values(layer, k, step)).all()) for x, k, step in pairs if k is not None)
    return few and (bits.weights > 2 or bool(layer.weight.abs().max() <= 1))


def _values(layer: nn.Module, bits: int, step: str) -> Tensor:
    if bits <= 2:
        return torch.tensor([-1.0, 1.0] if bits == 1 else [-1.0, 0.0, 1.0])
    low, high = lsq_range(bits)
    return torch.arange(low, high + 1) * getattr(layer, step)


@dataclass(frozen=True)
class Case:
    """A plugin, and the names of what is off its grid in a model between steps."""

    make: Callable[[], L.pytorch.plugins.precision.Precision]
    off_grid: Callable[[nn.Module], list[str]]


CASES = {
    "stochastic_rounding": Case(lambda: StochasticRounding(seed=3), held_in(torch.bfloat16)),
    "stochastic_rounding_8bit_states": Case(
        lambda: StochasticRounding(seed=3, states="8bit", bucket_mib=1e-3), held_in(torch.bfloat16)
    ),
    "stochastic_rounding_fp16": Case(lambda: StochasticRounding(seed=3, format="fp16", states="bf16"), held_in(torch.float16)),
    "fixed_point": Case(lambda: FixedPoint(seed=3), fixed_point(10, 32)),
    "courbariaux": Case(lambda: courbariaux(seed=3), fixed_point(10, 2)),
    "binary_net": Case(BinaryNet, few_values),
    "binary_connect": Case(binary_connect, few_values),
    "xnor_net": Case(xnor_net, few_values),
    "bi_real": Case(bi_real, few_values),
    "low_bit_ternary": Case(lambda: LowBit(weights=2, activations=2), few_values),
    "low_bit_lsq": Case(lambda: LowBit(weights=4, activations=3), few_values),
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


@each_plugin
def test_parameters_lie_on_the_declared_grid_after_training(case):
    assert case.off_grid(fit(case.make())) == []


@each_plugin
def test_training_moves_every_parameter(case):
    plugin, model = case.make(), net()
    start = dict(plugin.convert_module(net()).named_parameters())
    fit(plugin, 2, model)
    assert [name for name, weight in model.named_parameters() if torch.equal(weight, start[name])] == []


@each_plugin
def test_convert_module_works_in_place_and_a_second_time_changes_nothing(case):
    plugin, model = case.make(), net()
    parameters = [id(p) for p in model.parameters()]
    assert plugin.convert_module(model) is model
    once = {name: value.clone() for name, value in model.state_dict().items()}
    assert plugin.convert_module(model) is model
    assert [id(p) for p in model.parameters() if id(p) in parameters] == parameters
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


class Save(L.Callback):
    def __init__(self, path) -> None:
        self.path = path

    def on_train_end(self, trainer, module) -> None:
        trainer.save_checkpoint(self.path)


def checkpoint(plugin, path, epochs: int, start=None, average: bool = False) -> dict:
    """What a run of so many epochs leaves, all of it; from the start or from a checkpoint."""
    callbacks = [EMA(decay=0.9), Save(path)] if average else [Save(path)]
    run = trainer(plugin, epochs, gradient_clip_val=1.0, callbacks=callbacks)
    run.fit(net(0 if start is None else 5), loader(), ckpt_path=start, weights_only=True)
    return torch.load(path, weights_only=True)


def differences(a, b, path: str = "") -> list[str]:
    """Where two checkpoints differ, by a bit or a type."""
    if isinstance(a, dict):
        return [at for key in a.keys() | b.keys() for at in differences(a.get(key), b.get(key), f"{path}/{key}")]
    if isinstance(a, list):
        return [at for place, pair in enumerate(zip(a, b, strict=True)) for at in differences(*pair, f"{path}/{place}")]
    same = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
    return [] if same else [path]


@pytest.mark.parametrize("average", [False, True], ids=["", "ema"])
@each_plugin
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_never_interrupted(case, average, tmp_path):
    """Weights, averages, moments, learned steps and the scheduler."""
    whole = checkpoint(case.make(), tmp_path / "whole.ckpt", 3, average=average)
    checkpoint(case.make(), tmp_path / "half.ckpt", 1, average=average)
    resumed = checkpoint(case.make(), tmp_path / "resumed.ckpt", 3, tmp_path / "half.ckpt", average)
    ours = type(case.make()).__qualname__
    kept = ["state_dict", "optimizer_states", "lr_schedulers", *[key for key in (ours, "ema_training_weights") if key in whole]]
    assert [at for key in kept for at in differences(whole[key], resumed[key], key)] == []
    assert whole["global_step"] == resumed["global_step"] == 12


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
def test_two_ranks_stay_bit_identical(tmp_path):
    for name, case in CASES.items():
        fit(case.make(), strategy="ddp_fork", devices=2, callbacks=[Difference(tmp_path / name)])
    assert {name: (tmp_path / name).read_text() for name in CASES} == dict.fromkeys(CASES, "0.0")


@each_plugin
def test_accumulated_batches_take_one_step(case):
    plugin, model = case.make(), net()
    fit(plugin, 1, model, accumulate_grad_batches=4)
    assert model.trainer.global_step == 1
    assert case.off_grid(model) == []


class Norms(L.Callback):
    """The norm of the gradients that each step was taken with."""

    def on_train_start(self, *_) -> None:
        self.norms = []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        gradients = [p.grad.double().flatten() for p in module.parameters() if p.grad is not None]
        self.norms.append(torch.cat(gradients).norm().item())


@each_plugin
def test_gradients_are_clipped_before_the_step(case):
    """bfloat16 gradients keep a norm to 2**-8 of it."""
    free, clipped = Norms(), Norms()
    trainer(case.make(), callbacks=[free]).fit(net(), loader())
    trainer(case.make(), callbacks=[clipped], gradient_clip_val=0.01).fit(net(), loader())
    assert min(free.norms) > 0.02
    assert max(clipped.norms) <= 0.01 * (1 + 2.0**-8)


class Stops(Net):
    """The scheduler sets the rate to zero after two steps."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class States(L.Callback):
    """Parameters and statistics after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.after.append({name: value.clone() for name, value in module.state_dict().items() if value.is_floating_point()})


@each_plugin
def test_a_rate_that_the_scheduler_sets_to_zero_freezes_every_weight(case):
    torch.manual_seed(0)
    states = States()
    fit(case.make(), 1, Stops(), callbacks=[states])
    one, two, three, four = ({n: w for n, w in state.items() if "running" not in n} for state in states.after)
    assert all(torch.equal(two[name], three[name]) and torch.equal(three[name], four[name]) for name in two)
    assert not any(torch.equal(one[name], two[name]) for name in one if name.endswith("weight"))


@each_plugin
def test_ema_averages_what_training_made_and_changes_no_bit_of_it(case):
    """Validation swaps the average in and out after each epoch; it is kept in float32, and rounded once when it is put in."""
    plain, averaged = States(), States()
    fit(case.make(), 2, callbacks=[plain])
    model = net()
    run = trainer(case.make(), 2, gradient_clip_val=1.0, callbacks=[EMA(decay=0.9), averaged])
    model.validation_step = lambda batch, batch_idx: None
    run.fit(model, loader(), loader())
    assert differences(plain.after, averaged.after) == []
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            mean = plain.after[0][name].double()
            for n, state in enumerate(plain.after[1:], 1):
                mean = mean.lerp(state[name].double(), 1 - ema_decay(n, 0.9))
            ulp = torch.finfo(value.dtype).eps * mean.abs()
            assert ((value.double() - mean).abs() <= ulp / 2 + 2.0**-21 * mean.abs() + 1e-9).all(), name


@pytest.fixture
def unchecked_shapes():
    """Dynamo cannot trace the run-time shape checks that the tests add to functional."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.compiler.reset()


@each_plugin
def test_a_compiled_model_takes_the_same_steps(case, unchecked_shapes):
    """Captured by Dynamo and run as captured: whatever the trace got wrong would move a bit."""
    eager, model = fit(case.make()), net()
    compiled = torch.compile(model, backend="eager")
    trainer(case.make(), gradient_clip_val=1.0).fit(compiled, loader())
    assert differences(dict(eager.named_parameters()), dict(model.named_parameters())) == []
