"""`ConvAlgorithm` inside a real Trainer."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.conv import ConvAlgorithm, _tuner, auto, report
from lightning_cnn.conv._swap import SwappedConv2d
from lightning_cnn.errors import ConfigurationError, NoEffectWarning

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Small(L.LightningModule):
    def __init__(self, fail_at=None):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.Flatten(), nn.Linear(512, 10)
        )
        self.fail_at, self.seen = fail_at, set()

    def training_step(self, batch, batch_idx):
        image, label = batch
        self.seen |= {type(layer) for layer in self.net}
        if batch_idx == self.fail_at:
            raise RuntimeError("lost")
        return F.cross_entropy(self.net(image), label)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def digits(n=96):
    pictures, labels = load_digits(return_X_y=True)
    images = torch.tensor(pictures[:n], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return DataLoader(TensorDataset(images, torch.tensor(labels[:n])), 32)


def fit(callback, model=None, **options):
    torch.manual_seed(0)
    model = Small() if model is None else model
    trainer = L.Trainer(callbacks=[callback] if callback else [], enable_checkpointing=False, **{"max_epochs": 2, **QUIET, **options})
    trainer.fit(model, digits(), digits(32))
    return model, trainer


@pytest.mark.parametrize("algorithm", ["default", "fft", "auto", {"net.2": "depthwise"}])
def test_training_on_digits_learns_the_same_weights_and_leaves_the_model_as_it_was(algorithm):
    plain, _ = fit(None)
    callback = ConvAlgorithm(algorithm=algorithm, cache=None)
    model, _ = fit(callback)
    assert SwappedConv2d in model.seen
    assert not any(isinstance(layer, SwappedConv2d) for layer in model.modules())
    for name, value in model.state_dict().items():
        assert torch.allclose(value, plain.state_dict()[name], atol=1e-5), name
    assert {row.role for row in callback.report.rows if row.role} == {"forward", "input", "weight"}
    if algorithm == "auto":
        assert all(row.seconds for row in callback.report.rows if row.role != "input")


def test_an_exception_puts_the_layers_back():
    model = Small(fail_at=1)
    with pytest.raises(RuntimeError, match="lost"):
        fit(ConvAlgorithm(algorithm="fft"), model)
    assert SwappedConv2d in model.seen
    assert not any(isinstance(layer, SwappedConv2d) for layer in model.modules())


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole, _ = fit(ConvAlgorithm(algorithm="fft"))
    _, trainer = fit(ConvAlgorithm(algorithm="fft"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Small()
    L.Trainer(callbacks=[ConvAlgorithm(algorithm="fft")], enable_checkpointing=False, max_epochs=2, **QUIET).fit(
        resumed, digits(), ckpt_path=tmp_path / "one.ckpt", weights_only=True
    )
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_mistakes_are_found_at_construction_and_a_model_without_convolutions_is_told():
    with pytest.raises(ConfigurationError, match="no algorithm 'quick'"):
        ConvAlgorithm(algorithm="quick")
    model = Small()
    model.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.warns(NoEffectWarning, match="no plain nn.Conv2d"):
        fit(ConvAlgorithm(algorithm="fft"), model, max_epochs=1)


@pytest.mark.parametrize(("slow", "kept"), [(False, "fft"), (True, "default")])
def test_choices_with_which_the_whole_step_is_slower_are_taken_back(monkeypatch, slow, kept):
    """A step takes a second by the default and more or less with the choices, says the clock."""
    settings = {"cache": None, "max_error": 0.01 if slow else 0.02}  # a tuner of this test's own
    callback, clock = ConvAlgorithm(algorithm="auto", trial_batches=5, recheck_epochs=0, **settings), [0.0]
    said = _tuner.Decision("fft", 1, 2, 0, 0, "said")
    monkeypatch.setattr(_tuner.Tuner, "measure", lambda self, calls: dict.fromkeys(calls, said))
    tuner = _tuner.tuner_for(_tuner.Settings(**settings).plan())

    def seconds(_):
        clock[0] += 1.0 if tuner.paused else 1.5 if slow else 0.5
        return clock[0]

    monkeypatch.setattr(auto, "_seconds", seconds)
    fit(callback, max_epochs=4)
    assert {row.algorithm for row in callback.report.rows if row.role == "forward"} == {kept}
    assert not tuner.paused


class Watched(Small):
    """Notes for each batch whether the choices are at work, and who is asked to measure when."""

    def __init__(self, tuner, fail_after):
        super().__init__()
        self.tuner, self.fail_after, self.training_batches, self.others = tuner, fail_after, [], []

    def training_step(self, batch, batch_idx):
        self.training_batches.append(self.tuner.paused)
        if len(self.training_batches) == self.fail_after:
            raise RuntimeError("lost")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.others.append(self.tuner.paused)


def watched(monkeypatch, max_error, fail_after=None):
    """A model beside a tuner of its own that chooses fft for all, and the callback that uses it."""
    callback = ConvAlgorithm(trial_batches=5, cache=None, max_error=max_error)
    said = _tuner.Decision("fft", 1, 2, 0, 0, "said")
    monkeypatch.setattr(_tuner.Tuner, "measure", lambda self, calls: dict.fromkeys(calls, said))
    return callback, Watched(_tuner.tuner_for(_tuner.Settings(max_error=max_error, cache=None).plan()), fail_after)


def test_every_other_training_batch_after_the_first_two_runs_by_the_default_and_nothing_else_does(monkeypatch):
    callback, model = watched(monkeypatch, 0.0601)
    fit(callback, model)
    assert model.training_batches == [False, False, False, True, False, True]
    assert not any(model.others)
    assert len(model.others) == 3  # with the sanity check
    assert [len(times) for times in callback._trial.times] == [2, 2]


def test_an_exception_in_a_batch_of_the_default_lets_the_choices_work_again(monkeypatch):
    callback, model = watched(monkeypatch, 0.0602, fail_after=4)
    with pytest.raises(RuntimeError, match="lost"):
        fit(callback, model)
    assert model.training_batches[-1] is True
    assert not model.tuner.paused


def test_what_was_put_off_is_measured_after_the_first_batch_and_choices_again_after_the_first_epoch(monkeypatch):
    callback, model = watched(monkeypatch, 0.0603)
    said = []
    monkeypatch.setattr(_tuner.Tuner, "tune_pending", lambda self: said.append(f"pending after {len(model.training_batches)}"))
    monkeypatch.setattr(_tuner.Tuner, "recheck", lambda self: said.append(f"again after {len(model.training_batches)}"))
    fit(callback, model, num_sanity_val_steps=0)
    training = [entry for entry in dict.fromkeys(said) if entry != "pending after 0"]
    assert training == ["pending after 1", "pending after 3", "again after 3", "pending after 4", "pending after 6"]


@pytest.mark.parametrize(("algorithm", "files"), [("auto", ["convolutions.png", "convolutions.txt"]), ("fft", ["convolutions.txt"])])
def test_the_run_s_folder_has_the_table_and_where_something_was_measured_the_picture(tmp_path, algorithm, files):
    logger = CSVLogger(tmp_path, name="", version="")
    callback = ConvAlgorithm(algorithm=algorithm, cache=None)
    fit(callback, logger=logger, max_epochs=1)
    assert sorted(path.name for path in tmp_path.glob("convolutions.*")) == files
    assert (tmp_path / "convolutions.txt").read_text() == f"{callback.report}\n"


def test_the_report_reads_as_a_table():
    from lightning_cnn.conv import swap

    layer = swap(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), {"0": "auto"}, cache=None)
    layer(torch.randn(1, 8, 12, 12)).sum().backward()
    text = str(report(layer))
    assert "1x8x12x12 * 8x8x3x3" in text
    assert "not swapped" in text
