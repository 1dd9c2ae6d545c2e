"""Cycles, members, and members answering together."""

import pytest
import torch
from _transfer import QUIET, Module, fit, loader, same, weights
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lightning_cnn.callbacks import Ensemble, HorizontalFlip, Marginalize, SnapshotEnsemble
from lightning_cnn.errors import ConfigurationError, NoEffectWarning


def test_the_learning_rate_falls_in_cycles():
    rates = []

    class Look(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    ensemble = SnapshotEnsemble(cycles=2)
    fit(Module(), ensemble, Look(), epochs=2)
    assert rates == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447] * 2, abs=1e-6)
    assert len(ensemble.members) == 2


def test_members_answer_with_the_log_of_their_mean_probability_and_then_fall_silent():
    module, ensemble = Module(), SnapshotEnsemble(cycles=3, use=2)
    trainer = fit(module, ensemble, epochs=3)
    images, own = next(iter(loader()))[0], weights(module)

    class Keep(Callback):
        def on_test_batch_end(self, trainer, pl_module, *rest):
            self.answer = pl_module(images)

    keep = Keep()
    trainer.callbacks.append(keep)
    trainer.test(module, loader(), verbose=False)
    module.eval()
    with torch.no_grad():
        each = [torch.func.functional_call(module, member, (images,)).softmax(-1) for member in ensemble.members[1:]]
        torch.testing.assert_close(keep.answer.exp(), torch.stack(each).mean(0))
        assert "forward" not in vars(module) and same(own, weights(module))


def test_resumed_members_are_the_same(tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole, resumed = SnapshotEnsemble(cycles=3), SnapshotEnsemble(cycles=3)
    fit(Module(momentum=0.9), whole, Save(), epochs=3)
    fit(Module(momentum=0.9), resumed, epochs=3, ckpt_path=tmp_path / "1.ckpt")
    assert len(resumed.members) == 3
    assert all(same(a, b) for a, b in zip(whole.members, resumed.members, strict=True))


def test_a_second_schedule_is_refused():
    with pytest.raises(ConfigurationError, match="return the optimizer alone"):
        fit(Module(lambda o: StepLR(o, 1)), SnapshotEnsemble())


def test_too_few_steps_are_refused():
    with pytest.raises(ConfigurationError, match="9 cycles need"):
        fit(Module(), SnapshotEnsemble(cycles=9), epochs=2)


def test_testing_without_members_is_said():
    with pytest.warns(NoEffectWarning, match="train with it first"):
        Trainer(callbacks=[SnapshotEnsemble()], **QUIET).test(Module(), loader(), verbose=False)


def test_marginalize_multiplies_the_snapshots_with_other_views():
    module, ensemble = Module(), SnapshotEnsemble(cycles=3, answer=False)
    trainer = fit(module, ensemble, Marginalize(views=[Ensemble("snapshots"), HorizontalFlip()]), epochs=3, val=loader())
    own = weights(module)
    images = torch.cat([batch[0] for batch in loader()])
    predicted = torch.cat(trainer.predict(module, DataLoader(images, batch_size=8)))
    module.eval()
    with torch.no_grad():
        each = [torch.func.functional_call(module, m, (x,)).softmax(-1) for m in ensemble.members for x in (images, images.flip(-1))]
    assert len(each) == 6 and same(own, weights(module))
    torch.testing.assert_close(predicted.exp(), torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)


def test_two_voices_for_the_same_members_are_refused():
    with pytest.raises(ConfigurationError, match="answer=False"):
        fit(Module(), SnapshotEnsemble(), Marginalize(views=[Ensemble("snapshots")]))
    with pytest.raises(ConfigurationError, match="there are 0"):
        fit(Module(), Marginalize(views=[Ensemble("snapshots")]))
