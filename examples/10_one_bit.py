"""Weights and activations of one bit on digits beside float32, and the trained network on packed bits.

Result: float32 99.3 % of the test digits; BinaryConnect (1-bit weights) 98.2, XNOR-Net and Bi-Real (1-bit weights and activations) 99.0
and 98.7; 3 seeds, 2 cores of an AMD EPYC (Zen 3), torch 2.15.0. The speed on packed bits is not yet measured.
Command: python examples/10_one_bit.py
"""

import sys

import lightning as L
import torch
from torch import nn

from lightning_cnn.data import Digits
from lightning_cnn.nn import pack
from lightning_cnn.precision import LowBit, bi_real, binary_connect, xnor_net

ROWS = {
    "float32": lambda: None,
    "BinaryConnect (W1A32)": binary_connect,
    "XNOR-Net (W1A1)": xnor_net,
    "Bi-Real (W1A1)": bi_real,
    "ternary (W2A2)": lambda: LowBit(weights=2, activations=2),
}


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 128, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(128), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0] / 8 - 1), batch[1])

    def test_step(self, batch, _):
        self.log("accuracy", (self.net(batch[0] / 8 - 1).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 3e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def run(plugin, seed, epochs):
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(max_epochs=epochs, plugins=plugin, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    model, data = Net(), Digits(batch_size=100, seed=seed)
    trainer.fit(model, datamodule=data)
    return 100 * trainer.test(model, datamodule=data, verbose=False)[0]["accuracy"], model


if __name__ == "__main__":
    seeds, epochs = (1, 1) if "--quick" in sys.argv else (3, 20)
    for name, plugin in ROWS.items():
        runs = [run(plugin(), seed, epochs) for seed in range(seeds)]
        print(f"{name:24} {sum(r[0] for r in runs) / seeds:5.1f} %  {[round(r[0], 1) for r in runs]}", flush=True)
        if name == "Bi-Real (W1A1)":
            model, x = runs[0][1].eval(), torch.randn(8, 1, 8, 8)
            print(f"  packed equals float: {torch.equal(pack(model).net(x), model.net(x))}")
