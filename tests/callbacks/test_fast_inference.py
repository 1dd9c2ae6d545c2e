"""A faster copy answers, agrees with the network, and is gone afterwards."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_cnn.callbacks import (
    Augmented,
    Ensemble,
    EvaluationReport,
    FastInference,
    HorizontalFlip,
    Marginalize,
    MCBatchNorm,
    MCDropout,
    NetworkNoise,
    SnapshotEnsemble,
    _changes,
    _trials,
)
from lightning_cnn.errors import ConfigurationError, NoEffectWarning


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )
        self.net[1].running_var.uniform_(0.5, 2)

    def forward(self, image):
        return self.net(image / 2)

    def predict_step(self, batch, batch_idx):
        return self(batch)


IMAGES = [torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]


def predicted(callback, model, *more):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [one for one in (callback, *more) if one]
    return torch.cat(Trainer(accelerator="cpu", callbacks=callbacks, **quiet).predict(model, DataLoader(IMAGES, batch_size=None)))


@pytest.fixture
def folding_pays(monkeypatch):
    place = "lightning_cnn.callbacks.fast_inference."
    monkeypatch.setattr(f"{place}timed", lambda run, device, repeats: [1.0])
    monkeypatch.setattr(f"{place}compared", lambda before, after, device: (2.0, 1.0, True))


def test_a_folded_copy_answers_and_the_network_stays(folding_pays):
    model, callback = Net(), FastInference(switches=["folded"], trial_share=math.inf)
    plain = predicted(None, model)
    calls = []
    model.net[1].register_forward_hook(lambda *a: calls.append(1))
    fast = predicted(callback, model)
    assert len(calls) == 1  # the first batch's reference; folded copies have no batch norm
    assert torch.allclose(fast, plain, atol=1e-5)
    assert callback.error < 1e-5 and callback.trials[0].kept
    assert "forward" not in vars(model.net)


def test_a_copy_that_disagrees_is_refused(monkeypatch, folding_pays):
    monkeypatch.setattr("lightning_cnn.callbacks.fast_inference._made", lambda name, net, best: (net, lambda x: best(x) * 1.1))
    model, callback = Net(), FastInference(switches=["folded"], trial_share=math.inf)
    with pytest.warns(NoEffectWarning, match="changed nothing"):
        assert torch.equal(predicted(callback, model), predicted(None, model))
    assert "off by" in str(callback.trials[0])


@pytest.mark.filterwarnings("ignore::lightning_cnn.errors.NoEffectWarning")
def test_what_cannot_be_used_is_named_with_the_reason():
    callback = FastInference(switches=["packed", "folded"], trial_share=math.inf)
    model = Net()
    model.net[1] = nn.Identity()
    predicted(callback, model)
    assert str(callback.trials[0]) == "packed needs 1-bit layers"
    assert str(callback.trials[1]).startswith("folded cannot be used: Sequential has no batch norm")


MEMBERS = {
    "MCDropout": lambda: Marginalize(views=["flip", MCDropout(2)]),
    "MCBatchNorm": lambda: Marginalize(views=[MCBatchNorm(2, data=IMAGES)]),
    "Ensemble": lambda: Marginalize(views=[Ensemble([__file__])]),  # which is never read
    "SnapshotEnsemble": SnapshotEnsemble,
    "EvaluationReport": lambda: EvaluationReport(compare={"mc": [MCDropout(2)]}),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_members_that_differ_inside_of_the_network_are_refused_in_both_orders(name, first):
    """One copy would answer for all of them, without the noise and with one member's weights."""
    model = Net()
    model.net.insert(4, nn.Dropout(0.5))
    one, other = (FastInference(), MEMBERS[name]()) if first else (MEMBERS[name](), FastInference())
    with pytest.raises(ConfigurationError, match=rf"{name}.*would answer for all of them"):
        predicted(one, model, other)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("module", [None, "net"])
def test_views_of_the_picture_go_around_the_copy_in_both_orders(module, first, folding_pays):
    views = lambda: Marginalize(views=[HorizontalFlip(), Augmented(2, augment=[])], module=module)  # noqa: E731
    slow, model, callback = predicted(views(), Net()), Net(), FastInference(switches=["folded"], trial_share=math.inf)
    fast = predicted(callback, model, views()) if first else predicted(views(), model, callback)
    assert callback.trials[0].kept
    assert torch.allclose(fast, slow, atol=1e-5)
    assert not torch.allclose(fast, predicted(None, Net()).log_softmax(-1), atol=1e-5)


def test_a_view_that_wraps_a_part_of_the_copied_part_is_refused():
    model = Net()
    model.outer = nn.Sequential(model.net)
    del model.net
    model.forward = lambda image: model.outer(image)
    with pytest.raises(ConfigurationError, match=r"Marginalize\(module='outer.0'\) works inside"):
        predicted(FastInference(), model, Marginalize(views=["flip"], module="outer.0"))


@pytest.mark.parametrize("first", [False, True])
def test_noise_of_training_is_off_in_the_copy_as_in_the_network(first, folding_pays):
    noise, callback = NetworkNoise(dropout=0.5, dropconnect=0.5), FastInference(switches=["folded"], trial_share=math.inf)
    fast = predicted(callback, Net(), noise) if first else predicted(noise, Net(), callback)
    assert callback.trials[0].kept
    assert torch.allclose(fast, predicted(None, Net()), atol=1e-5)


def test_two_batches_are_too_few_for_any_trial():
    model, callback = Net(), FastInference(switches=["memory", "folded"])
    with pytest.warns(NoEffectWarning, match="is over 10% of the .* ahead"):
        predicted(callback, model)
    assert ["not tried" in str(trial) for trial in callback.trials] == [True, True]


@pytest.mark.parametrize(("after", "steady"), [([0.9] * 6, True), ([0.9] * 5 + [9.0], True), ([0.9] * 4 + [9.0, 9.0], False)])
def test_a_copy_must_be_faster_turn_by_turn_and_not_by_one_lucky_one(monkeypatch, after, steady):
    seconds = {"before": iter([5.0] + [1.0] * 6), "after": iter([5.0, *after])}  # the first of each warms up
    monkeypatch.setattr(_trials, "_clocked", lambda step, device: next(seconds[step]))
    assert _trials.compared("before", "after", torch.device("cpu")) == (1.0, 0.9, steady)


def test_memory_is_kept_from_the_first_batch_to_the_end(monkeypatch, folding_pays):
    said = []
    monkeypatch.setattr(_changes, "keeps_memory", lambda: True)
    monkeypatch.setattr(_changes, "keep_memory", lambda: said.append("kept") or (lambda: said.append("given back")))
    monkeypatch.setattr(_trials, "timed", lambda step, device: [2.0 if said.count("kept") == said.count("given back") else 1.0])
    model, callback = Net(), FastInference(switches=["memory", "folded"], trial_share=math.inf)
    plain = predicted(None, model)
    assert torch.allclose(predicted(callback, model), plain, atol=1e-5)
    assert said == ["kept", "given back"] * 2  # the trial's two turns; the second lasts
    assert [trial.kept for trial in callback.trials] == [True, True]


def test_wrong_arguments_are_named_together():
    with pytest.raises(ConfigurationError, match=r"4 problems:\n.*warp.*\n.*least.*\n.*max_error.*\n.*trial_share"):
        FastInference(switches=["warp"], least=0, max_error=0, trial_share=0)
