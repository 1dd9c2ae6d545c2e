"""One worker is three times slower: what synchronous training loses, and asynchronous training keeps.

Result: 5 epochs of digits, a step standing for 20 ms of arithmetic: delayed_averaging 8.3 s (accuracy .942), async_sgd 8.8 s (.908),
sync_ddp (.931) 24.0 s, in which the start of the second process was still counted; one run, seed 0, 2 processes on 2 shared cores of an
AMD EPYC (Zen 3), torch 2.15.0. On a quiet machine, 5 seeds (benchmarks/strategies.py): 1.84 and 1.72 times the samples/s of sync_ddp.
Command: python examples/11_async_straggler.py
"""

import os
import sys
import time

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_cnn.strategy  # noqa: F401  registers "sync_ddp", "delayed_averaging" and "async_sgd"


class Digits(L.LightningModule):
    def __init__(self, slow_rank=1, step_s=0.02):
        super().__init__()
        self.slow_rank, self.step_s = slow_rank, step_s
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
        )  # fmt: skip

    def on_train_start(self):
        self.began = time.perf_counter()

    def training_step(self, batch, batch_index):
        time.sleep(self.step_s * (3 if self.global_rank == self.slow_rank else 1))  # stands in for a larger net
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def train(strategy, epochs):
    L.seed_everything(0, verbose=False)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    if dist.is_initialized():  # left by the synchronous run
        dist.destroy_process_group()
    trainer, model = L.Trainer(accelerator="cpu", devices=2, max_epochs=epochs, strategy=strategy, **quiet), Digits()
    trainer.fit(model, DataLoader(TensorDataset(x[360:], y[360:]), batch_size=16, shuffle=True))
    return time.perf_counter() - model.began, (model.net(x[:360]).argmax(1) == y[:360]).float().mean().item()


if __name__ == "__main__":
    epochs = 1 if "--quick" in sys.argv else 5
    for strategy in ("sync_ddp", "delayed_averaging", "async_sgd"):
        seconds, accuracy = train(strategy, epochs)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"{strategy:<18} {seconds:5.1f} s, accuracy {accuracy:.3f}")
