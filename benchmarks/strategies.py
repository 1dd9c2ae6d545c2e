"""Synchronous and asynchronous data parallelism with and without a slow worker.

    python benchmarks/strategies.py [--quick] [--json FILE]

Two gloo processes train a small CNN on scikit-learn's digits; the arithmetic of a larger net is stood in for by a sleep, so that both
processes are equally fast on any machine and one of them can be made exactly three times slower. Equal samples for all; the runs of one
seed follow each other in the same two processes. "ideal" for a 3x straggler is 2.0: (1 + 1/3) workers' work instead of 2 times 1/3.
"""

import argparse
import logging
import os
import time
import warnings
from collections import defaultdict
from statistics import mean, stdev

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _bench import Row, compare, medians, report
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.strategy import AsyncSGD, DelayedAveraging, SyncDDP

torch.set_num_threads(1)
SYNC, BATCH, STEP_S, SLOWER = "SyncDDP (Lightning's DDP)", 16, 0.010, 3
STRATEGIES = {
    SYNC: SyncDDP,
    "AsyncSGD": AsyncSGD,
    "DelayedAveraging": DelayedAveraging,
}


class Digits(LightningModule):
    """A small CNN whose step takes `STEP_S`, or `SLOWER` times that on the slow rank."""

    def __init__(self, seed: int, slow_rank: int | None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.slow_rank, self.starts = slow_rank, []
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    def training_step(self, batch, batch_idx):
        began = time.perf_counter()
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        time.sleep(max(0.0, STEP_S * (SLOWER if self.global_rank == self.slow_rank else 1) - (time.perf_counter() - began)))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)

    def on_train_epoch_start(self):
        self.starts.append(time.perf_counter())


def train(name: str, seed: int, slow_rank: int | None, epochs: int) -> tuple[float, float]:
    """Samples a second of all processes (the first epoch left out), and test accuracy."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None][order] / 16, torch.tensor(digits.target)[order]
    loader = DataLoader(TensorDataset(x[360:], y[360:]), batch_size=BATCH, shuffle=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=STRATEGIES[name](), max_epochs=epochs, **quiet)
    module = Digits(seed, slow_rank)
    trainer.fit(module, loader)
    rate = (len(x) - 360) * (epochs - 1) / (time.perf_counter() - module.starts[1])
    with torch.no_grad():
        return rate, (module.net(x[:360]).argmax(1) == y[:360]).float().mean().item()


def rows(seeds: int, epochs: int) -> list[Row]:
    table = []
    for slow_rank, case, bar in ((1, f"{SLOWER}x straggler", 1.8), (None, "equal workers", 0.97)):
        rates, accuracies = defaultdict(list), defaultdict(list)
        for seed in range(seeds):
            for name in STRATEGIES:
                rate, accuracy = train(name, seed, slow_rank, epochs)
                rates[name].append(rate)
                accuracies[name].append(accuracy)
        rate = medians(rates)
        for name in [n for n in STRATEGIES if n != SYNC]:
            table.append(compare(f"{case}: {name}", SYNC, rate[name], rate[SYNC], "samples/s", larger_is_better=True, bar=bar, n=seeds))
            table.append(accuracy_row(f"{case}: {name}, accuracy", accuracies[name], accuracies[SYNC]))
    return table


def accuracy_row(row: str, ours: list[float], theirs: list[float]) -> Row:
    """`ratio` is accuracy over accuracy; `bar` is what two standard errors of the paired difference allow."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    two_errors = 2 * stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return Row(row, SYNC, mean(ours), mean(theirs), "accuracy", mean(ours) / mean(theirs), 1 - two_errors / mean(theirs), len(ours))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two seeds")
    parser.add_argument("--json")
    options = parser.parse_args()
    table = rows(2 if options.quick else 5, epochs=3)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        report(table, options.json)
