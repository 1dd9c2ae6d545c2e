"""One CNN trained by one process, and by two that divide the pictures (Spatial), the layers (Pipeline) or the classifier (OneWeirdTrick).

Result: PENDING
Command: python examples/12_pipeline_spatial.py
"""

import os
import sys
import time

import lightning as L
import torch
import torch.distributed as dist
from torch import nn

from lightning_cnn.data import Digits
from lightning_cnn.strategy import OneWeirdTrick, Pipeline, Spatial

BATCH = 64
RUNS = {  # strategy and its processes; the global batch is the same
    "Spatial": (lambda: Spatial(height=2), BATCH),
    "Pipeline (1f1b)": (lambda: Pipeline(schedule="1f1b", micro_batches=4), BATCH),
    "Pipeline (zb)": (lambda: Pipeline(schedule="zb", micro_batches=4), BATCH),
    "OneWeirdTrick": (OneWeirdTrick, BATCH // 2),
    "one process": (lambda: "auto", BATCH),
}


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
            nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0] / 8 - 1), batch[1])

    def test_step(self, batch, _):
        answer = self.net(batch[0] / 8 - 1)
        self.log("accuracy", (answer.argmax(1) == batch[1]).float().mean(), sync_dist=True)
        self.log("loss", nn.functional.cross_entropy(answer, batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


if __name__ == "__main__":
    epochs = 1 if "--quick" in sys.argv else 3
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for name, (strategy, batch_size) in RUNS.items():
        alone = name == "one process"
        if alone and os.environ.get("LOCAL_RANK", "0") != "0":
            break
        if dist.is_initialized():
            dist.destroy_process_group()
        L.seed_everything(0, verbose=False)
        quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
        trainer = L.Trainer(accelerator="cpu", devices=1 if alone else 2, strategy=strategy(), max_epochs=epochs, **quiet)
        model, data = Net(), Digits(batch_size=batch_size, size_px=16)
        start = time.perf_counter()
        trainer.fit(model, datamodule=data)
        seconds = time.perf_counter() - start
        found = trainer.test(model, datamodule=data, verbose=False)[0]
        if trainer.is_global_zero:
            print(f"{name:16} accuracy {100 * found['accuracy']:.2f} %  loss {found['loss']:.12f}  {seconds:5.1f} s", flush=True)
