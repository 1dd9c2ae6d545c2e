"""Weights and activations of one bit on digits beside float32, and the trained network on packed bits.

Result: float32 99.3 % of the test digits; BinaryConnect (1-bit weights) 98.2, XNOR-Net and Bi-Real (1-bit weights and activations) 99.0
and 98.7. With --root, 3,000 CIFAR-10 pictures, from scratch, 15 epochs: float32 59.3 +- 0.9, XNOR-Net 55.3 +- 1.3, Bi-Real 54.9 +- 1.2,
BinaryConnect, whose first and last layer are of one bit too, 49.6 +- 0.2. 3 seeds each, 2 cores of an AMD EPYC (Zen 3), torch 2.15.0.
Command: python examples/10_one_bit.py [--root FOLDER_OF_PICTURES] [--only ROW --seed SEED]
"""

import argparse

import lightning as L
import torch
from torch import nn

from lightning_cnn.data import Digits, ImageFolders
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
    def __init__(self, channels=1, width=64, stride=1, features=512, white=16):
        super().__init__()
        self.white = white / 2
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(2 * width),
            nn.Flatten(), nn.Linear(features, 10),
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
    options = argparse.ArgumentParser()
    options.add_argument("--quick", action="store_true")
    for name in ("--root", "--only", "--seed"):
        options.add_argument(name)
    options = options.parse_args()
    seeds = [int(options.seed)] if options.seed else range(1 if options.quick else 3)
    for name, plugin in ROWS.items():
        if options.only in (None, name.split(" ")[0]):
            runs = [run(plugin(), seed, 1 if options.quick else 15 if options.root else 20, options.root) for seed in seeds]
            found = torch.tensor([100 * accuracy for accuracy, _ in runs])
            error = found.std(correction=min(1, len(seeds) - 1)) / len(seeds) ** 0.5
            print(f"{name:24} {found.mean():5.1f} +- {error:.1f} %  {[round(f, 1) for f in found.tolist()]}", flush=True)
            if name == "Bi-Real (W1A1)" and not options.root:
                model, x = runs[0][1].eval(), torch.randn(8, 1, 8, 8)
                print(f"  packed equals float: {torch.equal(pack(model).net(x), model.net(x))}")
