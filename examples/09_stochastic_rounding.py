"""Sixteen bits train a network if they are rounded stochastically, and do not if they are rounded to the nearest (Gupta 2015).

Result: fixed point (SGD): float32 97.0, <6,10> nearest 9.9 (chance), <6,10> stochastic 96.8; bfloat16 weights (AdamW): float32 89.3,
nearest 74.6, stochastic 89.1, with 8-bit moments 89.3. Per cent of test digits, 3 seeds; 2 cores of an AMD EPYC (Zen 3), torch 2.15.0.
Command: python examples/09_stochastic_rounding.py (writes losses.png)
"""

import sys

import lightning as L
from torch import nn, optim

from lightning_cnn import data, plot
from lightning_cnn.precision import FixedPoint, StochasticRounding

ROWS = {
    ("SGD", "float32"): lambda: None,
    ("SGD", "<6,10> nearest"): lambda: FixedPoint(integer_bits=6, fraction_bits=10, rounding="nearest"),
    ("SGD", "<6,10> stochastic"): lambda: FixedPoint(integer_bits=6, fraction_bits=10),
    ("AdamW", "float32"): lambda: None,
    ("AdamW", "bfloat16 nearest"): lambda: StochasticRounding(rounding="nearest"),
    ("AdamW", "bfloat16 stochastic"): StochasticRounding,
    ("AdamW", "bfloat16 stochastic, 8-bit moments"): lambda: StochasticRounding(states="8bit"),
}


class Net(L.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        first, second = ((nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)) for a, b in ((1, 8), (8, 16)))
        self.net = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.optimizer, self.losses = optimizer, []

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.net(batch[0] / 255), batch[1])
        self.losses.append(loss.item())
        return loss

    def test_step(self, batch, _):
        self.log("accuracy", (self.net(batch[0] / 255).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        adamw, sgd = optim.AdamW(self.parameters(), 2e-4), optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        return adamw if self.optimizer == "AdamW" else ([sgd], [optim.lr_scheduler.ExponentialLR(sgd, 0.95)])


def accuracy(optimizer, plugin, seed, epochs):
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(max_epochs=epochs, plugins=plugin, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    model, digits = Net(optimizer), data.Digits(batch_size=100, seed=seed)
    trainer.fit(model, digits)
    return 100 * trainer.test(model, digits, verbose=False)[0]["accuracy"], model.losses


if __name__ == "__main__":
    (seeds, epochs), curves = (1, 2) if "--quick" in sys.argv else (3, 60), {}
    for (optimizer, name), plugin in ROWS.items():
        runs, curves[f"{optimizer}, {name}"] = zip(*(accuracy(optimizer, plugin(), seed, epochs) for seed in range(seeds)), strict=True)
        print(f"{optimizer:6} {name:36} {sum(runs) / len(runs):5.1f} %  {[round(run, 1) for run in runs]}", flush=True)
    plot.loss_curves(curves).savefig("losses.png")
