"""Weights are pulled towards where they started."""

import logging

import pytest
import torch
from _transfer import Module, fit, same, weights
from lightning.pytorch.callbacks import Callback

from lightning_cnn.callbacks import L2SP, GradualUnfreezing
from lightning_cnn.errors import ConfigurationError, NoEffectWarning


def test_one_step_moves_by_the_gradient_of_the_penalty():
    """The first step starts at the anchor, so only the head feels a pull; the second feels one everywhere."""
    plain, ours = Module(lr=0.1), Module(lr=0.1)
    head = ours.model.fc.weight.detach().clone()
    fit(plain, epochs=1, limit_train_batches=1)
    fit(ours, L2SP(alpha=0.5, beta=0.2), epochs=1, limit_train_batches=1)
    torch.testing.assert_close(plain.model.top[0].weight, ours.model.top[0].weight, rtol=0, atol=0)
    torch.testing.assert_close(ours.model.fc.weight, plain.model.fc.weight - 0.1 * 0.2 * head)


def test_a_strong_pull_stays_near_the_start():
    def distance(*callbacks):
        module = Module(lr=0.05)
        start = module.model.top[0].weight.detach().clone()
        fit(module, *callbacks, epochs=10)
        return float((module.model.top[0].weight - start).norm())

    assert distance(L2SP(alpha=10.0)) < 0.5 * distance()


def test_nothing_is_pulled_with_zeros_and_that_is_said():
    plain, ours = Module(), Module()
    fit(plain)
    with pytest.warns(NoEffectWarning, match="pulls on nothing"):
        fit(ours, L2SP(alpha=0.0, beta=0.0))
    assert same(weights(plain), weights(ours))


def test_a_resumed_run_keeps_the_first_runs_anchor(tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole = Module(momentum=0.9)
    fit(whole, L2SP(alpha=0.5), Save(), epochs=3)
    for epoch in range(2):
        resumed = Module(momentum=0.9)
        fit(resumed, L2SP(alpha=0.5), epochs=3, ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert same(weights(whole), weights(resumed)), epoch


def test_frozen_weights_stay_frozen():
    module = Module()
    before = module.model.stem[0].weight.detach().clone()
    fit(module, GradualUnfreezing(up_to=1), L2SP(alpha=0.5))
    assert torch.equal(before, module.model.stem[0].weight)


def test_weight_decay_beside_it_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "lightning_cnn"):
        fit(Module(weight_decay=0.1), L2SP(), epochs=1)
    assert "weight_decay pulls towards zero" in caplog.text


def test_negative_strengths_are_refused():
    with pytest.raises(ConfigurationError, match="2 problems"):
        L2SP(alpha=-1, beta=-1)
