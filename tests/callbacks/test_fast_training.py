"""A switch stays where it is faster, is gone where it is not, and trying it leaves no trace."""

import logging
import math
from resource import RUSAGE_SELF, getrusage
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_cnn.callbacks import FastTraining, _changes, _trials
from lightning_cnn.callbacks._trials import CALLS, Allowance, Change, choose
from lightning_cnn.errors import ConfigurationError, NoEffectWarning


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.layouts = []

    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        self.layouts.append(self.net[0].weight.is_contiguous(memory_format=torch.channels_last))
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


def fitted(*callbacks, model=None, **options):
    torch.manual_seed(1)
    data = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])) for _ in range(3)]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=list(callbacks), **quiet, **options)
    model = model or Net()
    torch.manual_seed(2)
    trainer.fit(model, DataLoader(data, batch_size=None))
    return model, trainer


@pytest.fixture
def clock(monkeypatch):
    """Seconds as the test says: `timed` gives what `seconds` holds for the switches that are on."""
    on, seconds = set(), {}

    def timed(step, device, repeats=3):
        step()
        return [1.0 / torch.tensor([seconds.get(name, 1.0) for name in on]).prod().item()]

    monkeypatch.setattr(_trials, "timed", timed)
    return on, seconds


def tried(changes, share=math.inf, ahead_s=1.0):
    return choose(changes, 1.03, torch.device("cpu"), Allowance(ahead_s, share), 1.0)


def switch(name, on):
    def apply():
        on.add(name)
        return lambda: on.discard(name)

    return Change(name, apply, lambda: None)


def test_what_is_faster_is_kept_and_the_rest_is_undone(clock):
    on, seconds = clock
    seconds.update(fast=2.0, slow=0.5, same=1.01)
    trials, kept = tried([switch(name, on) for name in ("slow", "fast", "same")])
    assert on == {"fast"} == set(kept)
    assert [(trial.name, trial.kept) for trial in trials] == [("slow", False), ("fast", True), ("same", False)]
    assert str(trials[1]) == "fast kept at 2.00x (1000.00 -> 500.00 ms)"
    kept["fast"]()
    assert on == set()


def test_a_switch_that_fails_is_named_and_left_out(clock):
    def apply():
        raise RuntimeError("no such unit")

    trials, kept = tried([Change("broken", apply, lambda: None)])
    assert kept == {} and "no such unit" in str(trials[0])


@pytest.mark.parametrize(("steps_ahead", "made"), [(159, 0), (160, 1), (319, 1), (320, 2)])
def test_trials_are_made_while_they_take_a_tenth_of_what_lies_ahead(monkeypatch, steps_ahead, made):
    """A step takes a second, so a trial of a switch that is kept takes 16; two are to be tried."""
    now, on = [0.0], set()
    monkeypatch.setattr(_trials, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def step():
        now[0] += 1.0 - len(on) / 1e3

    changes = [Change(name, switch(name, on).apply, step) for name in ("one", "other")]
    trials, kept = choose(changes, 1.0, torch.device("cpu"), Allowance(float(steps_ahead), 0.1), 1.0)
    assert CALLS == 16 and len(kept) == made
    assert now[0] <= 0.1 * steps_ahead
    assert [("not tried" in str(trial)) for trial in trials] == [k >= made for k in range(2)]


def test_a_short_run_says_that_it_tried_nothing_and_why(caplog):
    with caplog.at_level(logging.INFO, "lightning_cnn"), pytest.warns(NoEffectWarning, match="is over 10% of the .* ahead"):
        fitted(FastTraining(switches=["channels_last"]))
    assert "channels_last was not tried" in caplog.text


def test_kept_memory_is_not_faulted_in_again_and_is_given_back():
    """80 MiB in two blocks, each of which glibc maps anew every time."""
    if not _changes.keeps_memory():
        assert _changes.keep_memory()() is None
        return

    def faults():
        before = getrusage(RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(40 * 2**18) for _ in range(2)]
        del blocks
        return getrusage(RUSAGE_SELF).ru_minflt - before

    undo = _changes.keep_memory()
    kept = min(faults() for _ in range(5))  # blocks find their places in the first rounds
    undo()
    # The first round, if the heap has room for both by now: what was given back is faulted in once more, and then stays
    assert 10 * kept < max(faults() for _ in range(5))


def keeping(monkeypatch, *names):
    def chosen(changes, *rest):
        changes = [change for change in changes if change.name in names]
        return [], {change.name: change.apply() for change in changes}

    monkeypatch.setattr("lightning_cnn.callbacks.fast_training.choose", chosen)
    return FastTraining()


def test_kept_switches_hold_during_the_fit_and_are_gone_after_it(monkeypatch):
    callback = keeping(monkeypatch, "channels_last", "fused")
    model, trainer = fitted(callback)
    assert model.layouts == [True] * 3
    assert model.net[0].weight.is_contiguous()
    assert trainer.optimizers == [] or not trainer.optimizers[0].param_groups[0]["fused"]


def test_trying_leaves_no_trace_in_weights_statistics_or_random_numbers():
    """No switch is kept, dropout draws from the global generator, and the weights end as without the callback."""
    plain, _ = fitted()
    with pytest.warns(NoEffectWarning, match="changed nothing"):
        tried, _ = fitted(FastTraining(switches=["memory", "channels_last", "fused"], least=1e9, trial_share=math.inf))
    for (name, a), b in zip(plain.state_dict().items(), tried.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_resumed_run_does_as_its_checkpoint_says_without_trials(monkeypatch):
    first = keeping(monkeypatch, "channels_last")
    fitted(first)
    monkeypatch.setattr("lightning_cnn.callbacks.fast_training.choose", lambda *a: pytest.fail("tried again"))
    second = FastTraining()
    second.setup(None, None, "fit")
    second.load_state_dict(first.state_dict())
    monkeypatch.setattr(second, "setup", lambda *a, **k: setattr(second, "_ready", True))
    model, _ = fitted(second)
    assert model.layouts == [True] * 3


def test_reasons_are_given_for_what_is_not_tried(caplog):
    callback = FastTraining(switches=["benchmark", "tf32", "compile"])
    with caplog.at_level(logging.INFO, "lightning_cnn"), pytest.warns(NoEffectWarning):
        fitted(callback)
    assert "benchmark is for GPUs; tf32 is for GPUs; compile was not tried" in caplog.text


def test_mixed_precision_replaces_plain_float32_and_is_given_back():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    before = trainer.precision_plugin
    undo = _changes.autocast(trainer, torch.bfloat16)
    with trainer.precision_plugin.train_step_context():
        assert Net()(torch.rand(1, 3, 8, 8)).dtype == torch.bfloat16
    undo()
    assert trainer.precision_plugin is before


def test_fused_and_plain_optimizers_agree():
    model = Net()
    optimizer = model.configure_optimizers()
    assert _changes.can_be_fused(optimizer)
    undo = _changes.fused([optimizer])
    _changes.optimizer_step([optimizer])()
    assert optimizer.param_groups[0]["fused"] and not optimizer.state
    undo()
    assert not optimizer.param_groups[0]["fused"]
    assert not _changes.can_be_fused(torch.optim.RMSprop(model.parameters()))


@pytest.mark.filterwarnings("ignore::lightning_cnn.errors.NoEffectWarning")
def test_a_module_without_forward_is_refused_by_name():
    class Blind(Net):
        def forward(self, image, mask):
            return self.net(image)

    with pytest.raises(ConfigurationError, match="times forward\\(image\\) of Blind"):
        fitted(FastTraining(), model=Blind())


def test_wrong_arguments_are_named_together():
    with pytest.raises(ConfigurationError, match=r"3 problems:\n.*warp not known.*\n.*least.*\n.*trial_share"):
        FastTraining(switches=["warp"], least=0.5, trial_share=0)
