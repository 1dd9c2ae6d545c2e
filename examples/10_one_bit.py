"""Weights and activations of one bit on digits beside float32, and the trained network on packed bits.

Result: float32 99.3 % of the test digits; BinaryConnect (1-bit weights) 98.2, XNOR-Net and Bi-Real (1-bit weights and activations) 99.0
and 98.7. With a folder of 3,000 CIFAR-10 pictures, from scratch, 15 epochs: float32 59.3 +- 0.9, XNOR-Net 55.3 +- 1.3, Bi-Real 54.9 +- 1.2,
BinaryConnect, whose first and last layer are of one bit too, 49.6 +- 0.2. 3 seeds each, 2 cores of an AMD EPYC (Zen 3), torch 2.15.0.
Command: python examples/10_one_bit.py [FOLDER_OF_PICTURES]
"""

import sys

import lightning as L
import numpy as np
import torch
from torch import nn

from lightning_cnn.data import Digits, ImageFolders
from lightning_cnn.nn import pack
from lightning_cnn.precision import bi_real, binary_connect, xnor_net

ROWS = {"float32": lambda: None, "BinaryConnect (W1A32)": binary_connect, "XNOR-Net (W1A1)": xnor_net, "Bi-Real (W1A1)": bi_real}


class Net(L.LightningModule):
    def __init__(self, channels=1, width=64, stride=1, features=512, white=16):
        super().__init__()
        self.white, self.net = white / 2, nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(2 * width), nn.Flatten(), nn.Linear(features, 10),
        )  # fmt: skip

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0] / self.white - 1), batch[1])

    def test_step(self, batch, _):
        self.log("accuracy", (self.net(batch[0] / self.white - 1).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 3e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def run(plugin, seed, epochs, root=None):
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(max_epochs=epochs, plugins=plugin, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    model = Net(3, 32, 2, 1024, 255) if root else Net()
    data = ImageFolders(root=root, size_px=32, batch_size=50, seed=seed) if root else Digits(batch_size=100, seed=seed)
    trainer.fit(model, datamodule=data)
    return trainer.test(model, datamodule=data, verbose=False)[0]["accuracy"], model


if __name__ == "__main__":
    root = next((word for word in sys.argv[1:] if word != "--quick"), None)
    seeds, epochs = (1, 1) if "--quick" in sys.argv else (3, 15 if root else 20)
    for name, plugin in ROWS.items():
        runs = [run(plugin(), seed, epochs, root) for seed in range(seeds)]
        found = np.array([100 * accuracy for accuracy, _ in runs])
        print(f"{name:24} {found.mean():5.1f} +- {found.std(ddof=seeds > 1) / seeds**0.5:.1f} %  {found.round(1)}", flush=True)
    model, x = runs[0][1].eval(), torch.randn(8, *((3, 32, 32) if root else (1, 8, 8)))
    print("Bi-Real, packed, equals float:", torch.equal(pack(model).net(x), model.net(x)))
