"""The temperature is fitted in validation, saved, restored, and applied in test and prediction alone."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.callbacks import HorizontalFlip, Marginalize, TemperatureScaling
from lightning_cnn.errors import NoEffectWarning
from lightning_cnn.functional.calibration import fit_temperature

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = torch.multinomial(X.softmax(-1), 1, generator=torch.Generator().manual_seed(1))[:, 0]


class TooSure(L.LightningModule):
    """Logits three times too large for labels drawn from softmax(x)."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return x * self.scale

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("nll", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def data(size=16):
    return DataLoader(TensorDataset(X, Y), batch_size=size)


def trainer(*callbacks, **options):
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **QUIET, "callbacks": list(callbacks), **options})


def test_it_is_fitted_in_validation_and_divides_the_logits_in_test_and_prediction():
    model, callback = TooSure(), TemperatureScaling()
    raw = trainer(callback).validate(model, data(), verbose=False)[0]["nll"]
    assert raw == pytest.approx(F.cross_entropy(3 * X, Y).item(), rel=1e-5), "validation itself stays raw"
    assert callback.temperature == pytest.approx(fit_temperature(3 * X, Y), rel=1e-6)
    assert trainer(callback).test(model, data(), verbose=False)[0]["nll"] < raw
    torch.testing.assert_close(torch.cat(trainer(callback).predict(model, data())), 3 * X / callback.temperature)
    assert "forward" not in model.__dict__


def test_it_is_saved_and_restored_by_ckpt_path(tmp_path):
    model, callback = TooSure(), TemperatureScaling()
    fitting = trainer(callback)
    fitting.fit(model, data(), data())
    fitting.save_checkpoint(tmp_path / "a.ckpt")
    fresh = TemperatureScaling()
    trainer(fresh).test(TooSure(), data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    assert fresh.temperature == callback.temperature > 1


@pytest.mark.forks
def test_two_processes_fit_the_temperature_of_the_whole(tmp_path):
    class Save(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            torch.save(callback.temperature, tmp_path / f"{trainer.global_rank}.pt")

    callback = TemperatureScaling()
    trainer(callback, Save(), strategy="ddp_fork", devices=2).validate(TooSure(), data(8), verbose=False)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(fit_temperature(3 * X, Y), rel=1e-5)


def test_after_marginalize_it_calibrates_the_mean_and_both_leave():
    model, scaling = TooSure(), TemperatureScaling()
    trainer(Marginalize(views=[HorizontalFlip()]), scaling).validate(model, data(), verbose=False)
    mean = ((3 * X).softmax(-1) / 2 + (3 * X.flip(-1)).softmax(-1) / 2).log()
    assert scaling.temperature == pytest.approx(fit_temperature(mean, Y), rel=1e-5)
    assert "forward" not in model.__dict__


def test_without_a_temperature_it_warns_and_changes_nothing():
    with pytest.warns(NoEffectWarning, match="no temperature yet"):
        found = torch.cat(trainer(TemperatureScaling()).predict(TooSure(), data()))
    assert torch.equal(found, 3 * X)
