"""Ask what holds training back, do what the verdict says, ask again.

Result: 525 images/s from a folder of JPEGs (verdict: slow_decode), 1,925 packed once (verdict: small_batch), 5,199 in batches of 64.
60 steps each, one run; one thread of an AMD EPYC (Zen 3), torch 2.15.0.
Command: OMP_NUM_THREADS=1 python examples/13_find_the_bottleneck.py
"""

import sys
import tempfile
from pathlib import Path

import lightning as L
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn, optim

from lightning_cnn.callbacks import BottleneckMonitor
from lightning_cnn.data import ImageFolders, PackedDataModule, pack


def photographs(folder, many):
    """JPEGs of 400 pixels, cut from two photographs: a class each."""
    for k, photo in enumerate(load_sample_images().images):
        (folder / str(k)).mkdir(parents=True)
        for i in range(many):
            top, left = i % 28, 2 * i
            Image.fromarray(photo[top : top + 400, left : left + 400]).save(folder / str(k) / f"{i}.jpg", quality=93)
    return folder


class Small(L.LightningModule):
    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 16, 5, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0] / 255), batch[1])

    def configure_optimizers(self):
        return optim.AdamW(self.parameters(), lr=1e-3)


def asked(name, data, steps):
    """Train some steps and print the verdict; gives images/s."""
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, callbacks=[monitor := BottleneckMonitor()], barebones=True)
    trainer.fit(Small(), datamodule=data)
    print(f"\n== {name}\n{monitor.report}")
    return monitor.report.measured.images_per_s


if __name__ == "__main__":
    steps = 5 if "--quick" in sys.argv else 60
    with tempfile.TemporaryDirectory() as place:
        folder, packed = photographs(Path(place, "jpegs"), many=100), Path(place, "x.pack")
        speeds = [asked("a folder of JPEGs, batches of 8", ImageFolders(root=str(folder), size_px=64, batch_size=8), steps)]
        pack(folder, packed, size=64, workers=0, progress=False)
        speeds += [asked("packed once", PackedDataModule(train=str(packed), batch_size=8, lane="gather"), steps)]
        speeds += [asked("batches of 64", PackedDataModule(train=str(packed), batch_size=64, lane="gather"), steps)]
    print("\nimages/s:", " -> ".join(f"{speed:.0f}" for speed in speeds))
