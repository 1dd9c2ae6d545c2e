"""Sixteen bits train a network if they are rounded stochastically, and do not if they are rounded to the nearest (Gupta 2015).

Result: RESULT
Command: python examples/09_stochastic_rounding.py [--quick]
"""

import statistics
import sys

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn

from lightning_cnn.data import Digits
from lightning_cnn.precision import FixedPoint, StochasticRounding

FORMATS = {
    "fixed point": {
        "float32": lambda: {},
        "<6,10> nearest": lambda: {"plugins": FixedPoint(rounding="nearest")},
        "<6,10> stochastic": lambda: {"plugins": FixedPoint(rounding="stochastic")},
    },
    "bfloat16": {
        "float32": lambda: {},
        "nearest": lambda: {"plugins": StochasticRounding(rounding="nearest")},
        "stochastic": lambda: {"plugins": StochasticRounding()},
        "stochastic, 8-bit moments": lambda: {"plugins": StochasticRounding(states="8bit")},
    },
}


class Net(L.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip
        self.optimizer = optimizer

    def training_step(self, batch, batch_index):
        return F.cross_entropy(self.net(batch[0] / 255), batch[1])

    def test_step(self, batch, batch_index):
        self.log("accuracy", (self.net(batch[0] / 255).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        if self.optimizer == "bfloat16":
            return torch.optim.AdamW(self.parameters(), 2e-4)
        sgd = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        return [sgd], [torch.optim.lr_scheduler.ExponentialLR(sgd, 0.95)]


def accuracy(experiment, options, seed, epochs):
    L.seed_everything(seed, verbose=False)
    model, data = Net(experiment), Digits(batch_size=100, seed=seed)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", **quiet, **options)
    trainer.fit(model, datamodule=data)
    return 100 * trainer.test(model, datamodule=data, verbose=False)[0]["accuracy"]


if __name__ == "__main__":
    seeds, epochs = (1, 2) if "--quick" in sys.argv else (3, 60)
    for experiment, rows in FORMATS.items():
        for name, options in rows.items():
            runs = [accuracy(experiment, options(), seed, epochs) for seed in range(seeds)]
            print(f"{experiment:12} {name:26} {statistics.mean(runs):5.1f} %  {[round(run, 1) for run in runs]}", flush=True)
