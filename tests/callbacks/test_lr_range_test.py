"""A rate, a picture, and the weights as before."""

import pytest
import torch
from _transfer import Module, fit, same, weights
from lightning.pytorch.callbacks import Callback

from lightning_cnn.callbacks import LRRangeTest
from lightning_cnn.errors import ConfigurationError


class Start(Callback):
    def on_train_start(self, trainer, pl_module):
        self.weights, self.lr = weights(pl_module), trainer.optimizers[0].param_groups[0]["lr"]


def test_the_rate_is_set_the_curve_drawn_and_the_weights_put_back(tmp_path):
    module, test, start = Module(lr=1e-9), LRRangeTest(steps=40), Start()
    before = weights(module)
    fit(module, test, start, epochs=1, default_root_dir=tmp_path)
    assert module.lr == test.suggestion == start.lr > 1e-7
    assert (tmp_path / "lr_range.png").exists()
    assert same(before, start.weights)
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_resumed_run_keeps_the_rate_of_its_first_part(tmp_path):
    first, test = Module(lr=1e-9), LRRangeTest(steps=40)
    trainer = fit(first, test, epochs=1, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    (tmp_path / "lr_range.png").unlink()
    resumed, start = Module(lr=1e-9), Start()
    fit(resumed, LRRangeTest(steps=40), start, epochs=2, default_root_dir=tmp_path, ckpt_path=tmp_path / "part.ckpt")
    assert resumed.lr == first.lr == start.lr == test.suggestion
    assert not (tmp_path / "lr_range.png").exists()


def test_a_module_that_reads_its_rate_elsewhere_is_refused():
    module = Module()
    del module.lr
    with pytest.raises(ConfigurationError, match="no attribute 'lr'"):
        fit(module, LRRangeTest())


def test_bad_settings_are_refused_together():
    with pytest.raises(ConfigurationError, match="2 problems"):
        LRRangeTest(lowest=1.0, highest=0.1, steps=3)


def test_a_loss_that_never_falls_leaves_the_rate(tmp_path, caplog):
    class Flat(Module):
        def training_step(self, batch, batch_idx):
            return 0 * self(batch[0]).sum() + torch.tensor(float("nan"))

    module = Flat(lr=0.1)
    fit(module, LRRangeTest(steps=20), epochs=1, default_root_dir=tmp_path)
    assert module.lr == 0.1
