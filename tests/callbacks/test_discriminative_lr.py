"""Each stage learns at its own rate under any scheduler."""

import pytest
import torch
from _transfer import Module, Net, fit, same, weights
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from lightning_cnn.callbacks import DiscriminativeLR
from lightning_cnn.errors import ConfigurationError, NoEffectWarning

SCHEDULES = {
    "none": None,
    "cosine": lambda o: CosineAnnealingLR(o, 4),
    "lambda": lambda o: LambdaLR(o, lambda epoch: 0.5**epoch),
    "step": lambda o: StepLR(o, 1, 0.5),
    "onecycle": lambda o: OneCycleLR(o, 0.1, total_steps=4),
}


class Rates(Callback):
    """(scheduled, during the step) learning rate of each stage, a row an epoch."""

    def __init__(self):
        self.rows, self.now = [], {}

    def on_train_epoch_start(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        scheduled = {group["name"]: group["lr"] for group in optimizer.param_groups}
        step = optimizer.register_step_post_hook(lambda *_: None)
        step.remove()
        self.rows.append((scheduled, {}))

    def on_before_zero_grad(self, trainer, pl_module, optimizer):  # runs inside optimizer.step, in the closure
        self.rows[-1][1].update({group["name"]: group["lr"] for group in optimizer.param_groups})


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_stage_follows_the_schedule_times_its_factor(name):
    plain, ours = Rates(), Rates()
    fit(Module(SCHEDULES[name]), DiscriminativeLR(factors=[1.0]), plain, epochs=4)
    fit(Module(SCHEDULES[name]), DiscriminativeLR(), ours, epochs=4)
    for (reference, _), (scheduled, during) in zip(plain.rows, ours.rows, strict=True):
        assert scheduled == reference
        assert during == {stage: lr * {"head": 1.0, "model.top": 0.1}.get(stage, 0.01) for stage, lr in reference.items()}


def test_one_group_a_stage_and_each_parameter_in_exactly_one():
    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            self.groups = trainer.optimizers[0].param_groups

    look, module = Look(), Module()
    fit(module, DiscriminativeLR(decay=0.5), look, epochs=1)
    assert [(group["name"], group["lr_factor"]) for group in look.groups] == [
        ("head", 1.0), ("model.top", 0.5), ("model.body", 0.25), ("stem", 0.125),
    ]  # fmt: skip
    held = [id(parameter) for group in look.groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in module.parameters())


def test_a_users_own_groups_keep_their_settings():
    class Decay(Module):
        def configure_optimizers(self):
            matrices = [p for p in self.parameters() if p.dim() > 1]
            vectors = [p for p in self.parameters() if p.dim() == 1]
            return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=0.01, weight_decay=0.3)

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            self.groups = trainer.optimizers[0].param_groups

    look = Look()
    fit(Decay(), DiscriminativeLR(), look, epochs=1)
    assert {(group["weight_decay"], p.dim() > 1) for group in look.groups for p in group["params"]} == {(0.3, True), (0.0, False)}
    assert len({group["name"] for group in look.groups}) == len(look.groups) == 8


def test_factors_of_one_change_no_bit_and_say_so():
    plain, ours = Module(momentum=0.9), Module(momentum=0.9)
    fit(plain)
    with pytest.warns(NoEffectWarning, match="every factor is 1"):
        fit(ours, DiscriminativeLR(factors=[1.0]))
    assert same(weights(plain), weights(ours))


def test_a_step_moves_a_stage_in_proportion_to_its_factor():
    plain, ours = Module(), Module()
    start = weights(plain)
    fit(plain, epochs=1, limit_train_batches=1)
    fit(ours, DiscriminativeLR(factors=(1.0, 0.1, 0.0)), epochs=1, limit_train_batches=1)
    moved = {n: (weights(plain)[n] - start[n], weights(ours)[n] - start[n]) for n, _ in plain.named_parameters()}
    torch.testing.assert_close(moved["model.fc.weight"][1], moved["model.fc.weight"][0])
    torch.testing.assert_close(moved["model.top.0.weight"][1], 0.1 * moved["model.top.0.weight"][0], rtol=1e-3, atol=1e-7)
    assert not moved["model.stem.0.weight"][1].any()


@pytest.mark.parametrize("name", ["lambda", "onecycle"])
def test_resumed_at_every_epoch_is_bit_identical(name, tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole = Module(SCHEDULES[name], momentum=0.9)
    fit(whole, DiscriminativeLR(), Save(), epochs=4)
    for epoch in range(3):
        resumed = Module(SCHEDULES[name], net=Net(), momentum=0.9)
        fit(resumed, DiscriminativeLR(), epochs=4, ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert same(weights(whole), weights(resumed)), epoch


def test_an_exception_in_a_step_leaves_the_scheduled_rate_and_the_module_as_they_were():
    class Breaks(Module):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("a bad step")

    module, look = Breaks(), {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            look["optimizer"] = trainer.optimizers[0]

    with pytest.raises(RuntimeError, match="a bad step"):
        fit(module, DiscriminativeLR(), Look())
    assert {group["lr"] for group in look["optimizer"].param_groups} == {0.1}
    assert "configure_optimizers" not in vars(module)
    assert not look["optimizer"]._optimizer_step_pre_hooks


def test_bad_factors_are_refused_together():
    with pytest.raises(ConfigurationError, match=r"2 problems(?s:.)*at least 0, got -1(?s:.)*decay must be in"):
        DiscriminativeLR(factors=(1, -1), decay=2)


def test_an_optimizer_built_too_early_is_refused():
    class Early(Module):
        def __init__(self):
            super().__init__()
            self.built = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self):
            return self.built

    with pytest.raises(ConfigurationError, match="build it there, not earlier"):
        fit(Early(), DiscriminativeLR())
