"""Averaged weights: never untrained ones, never left behind by an exception, exact after a resume."""

import pytest
import torch
from _transfer import Module, fit, loader, same, weights
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint

from lightning_cnn.callbacks import EMA
from lightning_cnn.errors import ConfigurationError, NoEffectWarning


class Watch(Callback):
    """Weights as training and as validation saw them last."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained = weights(pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *rest):
        self.validated = weights(pl_module)


class Breaks(Callback):
    def on_validation_batch_end(self, trainer, pl_module, *rest):
        raise RuntimeError("in validation")


def test_a_late_start_validates_and_ends_with_trained_weights_where_the_stock_callback_does_not():
    start = weights(Module())
    stock, watch = Module(), Watch()
    fit(stock, EMAWeightAveraging(update_starting_at_step=10**6), watch, val=loader(8))
    assert same(start, watch.validated) and same(start, weights(stock))  # training is thrown away

    ours, watch = Module(), Watch()
    with pytest.warns(NoEffectWarning, match="never averaged"):
        fit(ours, EMA(start=10**6), watch, val=loader(8))
    assert same(watch.trained, watch.validated) and same(watch.trained, weights(ours))


def test_an_exception_in_validation_leaves_the_training_weights_where_the_stock_callback_does_not():
    for callback, leaves_average in ((EMAWeightAveraging(decay=0.9), True), (EMA(decay=0.9), False)):
        module, watch = Module(), Watch()
        with pytest.raises(RuntimeError, match="in validation"):
            fit(module, callback, watch, Breaks(), val=loader(8))
        assert same(watch.trained, weights(module)) != leaves_average


def test_a_short_run_is_not_dominated_by_the_first_step_where_the_stock_callback_is():
    def share(callback):
        """How far the final weights are on the way from the first step's to the last step's."""
        states = []

        class Collect(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                states.append(weights(pl_module)["model.fc.weight"])

        module = Module()
        fit(module, callback, Collect(), epochs=2)
        return float((module.model.fc.weight - states[0]).norm() / (states[-1] - states[0]).norm())

    assert share(EMAWeightAveraging()) < 0.02
    assert share(EMA()) > 0.5


def test_the_average_is_the_recursion():
    states = []

    class Collect(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            states.append(weights(pl_module)["model.fc.weight"])

    module = Module()
    fit(module, EMA(decay=0.5), Collect(), epochs=2)
    mean = states[0]
    for n, state in enumerate(states[1:], 1):
        decay = min(0.5, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * state
    torch.testing.assert_close(module.model.fc.weight.detach(), mean)


def test_training_itself_is_untouched():
    plain, ours, watch = Module(), Module(), Watch()
    fit(plain, val=loader(8))
    fit(ours, EMA(decay=0.9), watch, val=loader(8))
    assert same(weights(plain), watch.trained)
    assert not same(watch.trained, weights(ours))


def test_gradient_accumulation_counts_optimizer_steps():
    ema, counts = EMA(), []

    class Count(Callback):
        def on_train_end(self, trainer, pl_module):
            counts.append(ema._updates)

    fit(Module(), Count(), ema, epochs=1, accumulate_grad_batches=2)
    assert counts == [2]


def test_resumed_at_every_epoch_is_bit_identical_and_the_checkpoint_holds_the_average(tmp_path):
    watch = Watch()
    whole = Module(momentum=0.9)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, monitor="val/loss")
    fit(whole, EMA(decay=0.9), keep, watch, epochs=3, val=loader(8), enable_checkpointing=True)
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    assert same(saved["state_dict"], weights(whole)) and same(saved["ema_training_weights"], watch.trained)
    for epoch in range(2):
        resumed = Module(momentum=0.9)
        fit(resumed, EMA(decay=0.9), epochs=3, val=loader(8), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert same(weights(whole), weights(resumed)), epoch


def test_a_checkpoint_written_after_the_end_can_be_trained_on(tmp_path):
    whole, first, second = Module(momentum=0.9), Module(momentum=0.9), Module(momentum=0.9)
    fit(whole, EMA(decay=0.9), epochs=3)

    class Last(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    fit(first, EMA(decay=0.9), Last(), epochs=2)
    fit(second, EMA(decay=0.9), epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert same(weights(whole), weights(second))


def test_frozen_weights_are_averaged_to_themselves():
    module = Module()
    module.model.stem.requires_grad_(False)
    before = module.model.stem[0].weight.clone()
    fit(module, EMA(decay=0.9), epochs=3)
    assert torch.equal(before, module.model.stem[0].weight)


def test_a_half_precision_model_is_averaged_in_float32():
    module, ema, kinds = Module().to(torch.bfloat16), EMA(), []

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            kinds.extend({mean.dtype for mean in ema._average.values()})

    fit(module, Look(), ema, epochs=1, precision="bf16-true")
    assert kinds == [torch.float32]
    assert module.model.fc.weight.dtype == torch.bfloat16


def test_bad_settings_are_refused_together():
    with pytest.raises(ConfigurationError, match="3 problems"):
        EMA(decay=1.0, start=-1, every=0)
