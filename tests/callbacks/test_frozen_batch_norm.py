"""Frozen statistics do not move, and normalise by their stored values."""

import pytest
import torch
from _transfer import Module, fit, loader
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, Callback

from lightning_cnn.callbacks import FrozenBatchNorm
from lightning_cnn.errors import ConfigurationError, NoEffectWarning


class StockFreeze(BaseFinetuning):
    """What Lightning's documentation shows: freeze a part for good."""

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.model.stem, pl_module.model.body], train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


class HandFreeze(Callback):
    def setup(self, trainer, pl_module, stage):
        pl_module.model.stem.requires_grad_(False)
        pl_module.model.body.requires_grad_(False)


class Watch(Callback):
    """How the frozen stem answers to one picture, alone and among others, in the state in which training runs it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        stem, image = pl_module.model.stem, batch[0]
        with torch.no_grad():
            self.alone, self.among = stem(image[:1]), stem(image)[:1]


def statistics(module):
    return {
        name: value.clone() for name, value in module.state_dict().items() if "running" in name and ("stem" in name or "body" in name)
    }


def moved(before, module) -> bool:
    return any(not torch.equal(before[name], value) for name, value in statistics(module).items())


def test_lightnings_freezing_moves_statistics_or_normalises_by_the_batch():
    module = Module()
    module.backbone = module.model.stem
    before = statistics(module)
    module.configure_optimizers = lambda: torch.optim.SGD(module.model.fc.parameters(), lr=0.1)
    fit(module, BackboneFinetuning(unfreeze_backbone_at_epoch=99, train_bn=False))
    assert moved(before, module)

    watch = Watch()
    fit(Module(), StockFreeze(), watch)
    assert not torch.allclose(watch.alone, watch.among, atol=1e-3)


@pytest.mark.parametrize("val", [None, loader(8)], ids=["train only", "with validation"])
def test_frozen_statistics_do_not_move_and_normalise_by_their_stored_values(val):
    module, watch = Module(), Watch()
    before = statistics(module)
    fit(module, HandFreeze(), FrozenBatchNorm(), watch, val=val)
    assert not moved(before, module)
    torch.testing.assert_close(watch.alone, watch.among)


def test_the_trainable_norms_go_on_learning():
    module = Module()
    before = module.model.top[1].running_mean.clone()
    fit(module, HandFreeze(), FrozenBatchNorm())
    assert not torch.equal(before, module.model.top[1].running_mean)
    assert all(layer.training for layer in module.modules())


def test_all_keeps_every_statistic_and_trains_every_weight():
    module = Module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, FrozenBatchNorm(layers="all"))
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "running" in name)
    assert not torch.equal(before["model.top.1.weight"], after["model.top.1.weight"])


def test_a_layer_without_weights_goes_with_the_parameters_beside_it():
    module = Module()
    module.model.stem[1] = torch.nn.BatchNorm2d(6, affine=False)
    fit(module, HandFreeze(), FrozenBatchNorm(layers="frozen"))
    assert torch.equal(module.model.stem[1].running_mean, torch.zeros(6))


def test_nothing_to_hold_is_said():
    with pytest.warns(NoEffectWarning, match="holds no layer"):
        fit(Module(), FrozenBatchNorm(), epochs=1)


def test_a_pattern_without_a_match_is_refused_with_the_names():
    with pytest.raises(ConfigurationError, match=r"layers='bn9' matches no layer.*model\.stem\.1"):
        fit(Module(), FrozenBatchNorm(layers="bn9"), epochs=1)
