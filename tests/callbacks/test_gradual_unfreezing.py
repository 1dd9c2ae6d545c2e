"""Stages are unfrozen by depth; what is frozen is constant; a resumed run freezes the same."""

import pytest
import torch
from _transfer import Module, Net, fit, loader, same, weights
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_cnn.callbacks import DiscriminativeLR, GradualUnfreezing
from lightning_cnn.errors import ConfigurationError, NoEffectWarning

SCHEDULES = {"lambda": lambda o: LambdaLR(o, lambda epoch: 0.5**epoch), "onecycle": lambda o: OneCycleLR(o, 0.1, total_steps=5)}


_ANY = torch.zeros(())


class Trained(Callback):
    """Names of the parts whose weights ask for gradients, a row an epoch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            net = getattr(pl_module, "model", None) or pl_module.backbone
            self.rows.append([n for n, part in net.named_children() if next(part.parameters(), _ANY).requires_grad])


def saving(folder):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(folder / f"{trainer.current_epoch}.ckpt")

    return Save()


class Backboned(Module):
    """The layout that BackboneFinetuning asks for."""

    def __init__(self, schedule=None):
        super().__init__(schedule)
        net = self.model
        self.model = None
        self.backbone = torch.nn.Sequential(net.stem, net.down, net.body, net.down2, net.top, net.pool)
        self.head = torch.nn.Sequential(net.norm, net.fc)

    def forward(self, x):
        return self.head(self.backbone(x))


class BackbonedHead(Backboned):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)
        return optimizer if self.schedule is None else ([optimizer], [self.schedule(optimizer)])


def test_one_more_stage_an_epoch():
    look = Trained()
    fit(Module(), GradualUnfreezing(), look, epochs=5)
    assert look.rows == [
        ["fc"],
        ["top", "norm", "fc"],
        ["body", "top", "norm", "fc"],
        ["stem", "body", "top", "norm", "fc"],
        look.rows[3],
    ]


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, [1, 2, 3, 4, 4]),
        ({"every": 2}, [1, 1, 2, 2, 3]),
        ({"at": [1, 1, 4]}, [1, 3, 3, 3, 4]),
        ({"up_to": 1}, [1, 1, 1, 1, 1]),
        ({"unfrozen": 2, "up_to": 3}, [2, 3, 3, 3, 3]),
    ],
)
def test_the_schedule_counts_stages_from_the_head(settings, counts):
    unfreezing, seen = GradualUnfreezing(**settings), []

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            heads = [pl_module.model.fc, pl_module.model.top, pl_module.model.body, pl_module.model.stem]
            seen.append(sum(next(iter(part.parameters())).requires_grad for part in heads))

    fit(Module(), unfreezing, Look(), epochs=5, limit_train_batches=1)
    assert seen == counts


def test_what_is_frozen_does_not_change_by_a_bit():
    module = Module(net=Net(dropout=0.5), weight_decay=0.1, momentum=0.9)
    before = weights(module)
    fit(module, GradualUnfreezing(up_to=1), val=loader(8))
    after = weights(module)
    kept = [name for name in before if torch.equal(before[name], after[name])]
    assert kept == [name for name in before if not name.startswith("model.fc")]
    assert all(p.requires_grad for p in module.parameters()) and all(m.training for m in module.modules())


@pytest.mark.parametrize("name", SCHEDULES)
def test_late_parameter_groups_break_schedulers_and_ours_do_not(name):
    with pytest.raises((ValueError, KeyError)):
        fit(BackbonedHead(SCHEDULES[name]), BackboneFinetuning(1, lambda epoch: 1.0, should_align=False), epochs=4)
    fit(Module(SCHEDULES[name]), GradualUnfreezing(), DiscriminativeLR(), epochs=5)


def test_backbone_finetuning_loses_equal_valued_parameters_and_ours_does_not():
    look = {}

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
            look["counts"] = {name: held.count(id(p)) for name, p in pl_module.named_parameters()}

    fit(BackbonedHead(), BackboneFinetuning(unfreeze_backbone_at_epoch=0), Look(), epochs=1)
    assert 0 in look["counts"].values()
    fit(Module(), GradualUnfreezing(), DiscriminativeLR(), Look(), epochs=1)
    assert set(look["counts"].values()) == {1}


def test_backbone_finetuning_freezes_again_on_resume_and_ours_does_not(tmp_path):
    first, again = Trained(), Trained()
    fit(BackbonedHead(), BackboneFinetuning(1), first, saving(tmp_path), epochs=2)
    fit(BackbonedHead(), BackboneFinetuning(1), again, epochs=3, ckpt_path=tmp_path / "1.ckpt", enable_progress_bar=False)
    assert first.rows[1] != again.rows[0]

    first, again = Trained(), Trained()
    fit(Module(), GradualUnfreezing(at=[1]), first, saving(tmp_path), epochs=2)
    fit(Module(), GradualUnfreezing(at=[1]), again, epochs=3, ckpt_path=tmp_path / "1.ckpt")
    assert first.rows[1] == again.rows[0]


@pytest.mark.parametrize("settings", [{}, {"monitor": "val/loss", "patience": 1, "min_delta": 0.2}], ids=["epoch", "plateau"])
@pytest.mark.parametrize("schedule", [*SCHEDULES, None])
def test_resumed_at_every_epoch_is_bit_identical(settings, schedule, tmp_path):
    def run(module, *callbacks, **more):
        fit(module, GradualUnfreezing(**settings), DiscriminativeLR(), *callbacks, epochs=5, val=loader(8), **more)
        return weights(module)

    def fresh():
        return Module(SCHEDULES.get(schedule), momentum=0.9)

    look = Trained()
    whole = run(fresh(), saving(tmp_path), look)
    assert len({tuple(row) for row in look.rows}) > 2  # stages were unfrozen on the way
    for epoch in range(4):
        assert same(whole, run(fresh(), ckpt_path=tmp_path / f"{epoch}.ckpt")), epoch


def test_a_checkpoint_written_during_validation_knows_the_plateau(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(*callbacks, **more):
        module, look = Module(lr=0.0), Trained()
        unfreezing = GradualUnfreezing(monitor="val/loss", patience=1)
        fit(module, unfreezing, look, *callbacks, epochs=4, val=loader(8), enable_checkpointing=True, **more)
        return look.rows

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val/loss", save_top_k=-1, save_on_train_epoch_end=False)
    rows = run(keep)
    assert run(ModelCheckpoint(tmp_path / "b"), ckpt_path=tmp_path / "epoch=1.ckpt")[-1] == rows[-1]
    assert len(rows[-1]) > len(rows[0])


def test_an_exception_thaws():
    class Breaks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("stop")

    module = Module()
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, GradualUnfreezing(), Breaks())
    assert all(p.requires_grad for p in module.parameters()) and all(m.training for m in module.modules())


def test_parameters_left_out_of_the_optimizer_are_refused_by_name():
    class HeadOnly(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.fc.parameters(), lr=0.1)

    with pytest.raises(ConfigurationError, match=r"14 parameters are in no optimizer.*model\.stem\.0\.weight"):
        fit(HeadOnly(), GradualUnfreezing())


def test_a_metric_that_is_not_logged_is_refused_with_those_that_are():
    with pytest.raises(ConfigurationError, match=r"'val/acc', which was not logged; logged: .*val/loss"):
        fit(Module(), GradualUnfreezing(monitor="val/acc"), val=loader(8))


def test_bad_settings_are_refused_together():
    with pytest.raises(ConfigurationError, match=r"4 problems"):
        GradualUnfreezing(every=0, mode="most", at=[1], monitor="val/loss", unfrozen=3, up_to=2)


def test_freezing_nothing_is_said():
    with pytest.warns(NoEffectWarning, match="freezes nothing: the network has 4 stages"):
        fit(Module(), GradualUnfreezing(unfrozen=4), epochs=1)


def test_plain_ddp_is_refused_with_the_strategy_that_works():
    with pytest.raises(ConfigurationError, match="ddp_find_unused_parameters_true"):
        fit(Module(), GradualUnfreezing(), strategy="ddp", devices=1)
