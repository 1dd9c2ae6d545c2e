"""The loggers get what they got before, at the same steps; only Lightning's book-keeping is gone."""

import csv

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_cnn.callbacks import LeanLogging


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss, "number": batch_idx}, prog_bar=True)
        self.log("mean_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(folder, *callbacks):
    data = DataLoader(torch.arange(40.0).view(10, 4) / 40, batch_size=2)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, log_every_n_steps=2, callbacks=list(callbacks), logger=CSVLogger(folder, name="", version=""),
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    model = Net()
    trainer.fit(model, data, data)
    with (folder / "metrics.csv").open() as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return trainer, model, rows


def test_the_loggers_get_the_same_values_at_the_same_steps(tmp_path):
    _, _, plain = fitted(tmp_path / "plain")
    trainer, model, lean = fitted(tmp_path / "lean", LeanLogging())

    assert len(lean) == len(plain) > 5
    assert sorted(sorted(row) for row in lean) == sorted(sorted(row) for row in plain)
    for one, other in zip(sorted(lean, key=str), sorted(plain, key=str), strict=True):
        assert {name: float(value) for name, value in one.items()} == pytest.approx({name: float(v) for name, v in other.items()})
    assert trainer.progress_bar_metrics["number"] == 4.0
    assert "log" not in vars(model)


def test_a_checkpoint_can_monitor_a_step_value_at_the_end_of_an_epoch(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="loss", save_on_train_epoch_end=True)
    trainer, _, _ = fitted(tmp_path, LeanLogging(), checkpoint)
    assert checkpoint.best_model_score == trainer.callback_metrics["loss"]
