"""Synchronous and asynchronous data parallelism with and without a slow worker, and what a message costs.

    python benchmarks/strategies.py [--quick] [--only straggler|equal|communication] [--json FILE]

Two gloo processes train a small CNN on scikit-learn's digits; the arithmetic of a larger net is stood in for by a sleep, so that both
processes are equally fast on any machine and one of them can be made exactly three times slower. Equal samples for all; the runs of one
seed follow each other in the same two processes. "ideal" for a 3x straggler is 2.0: (1 + 1/3) workers' work instead of 2 times 1/3.
`communication` times all-reduces of n processes and fits seconds = latency + bytes / bandwidth, the constants of docs/scaling.md.
"""

import argparse
import json
import logging
import os
import time
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _bench import Row, compare, medians, report
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.strategy import AsyncSGD, DelayedAveraging, LocalSGD, SyncDDP

torch.set_num_threads(1)
SYNC, BATCH, STEP_S, SLOWER, EPOCHS = "SyncDDP", 48, 0.020, 3, 6
BYTES = [2**k for k in range(10, 25, 2)]
STRATEGIES = {
    SYNC: SyncDDP,
    "AsyncSGD": AsyncSGD,
    "DelayedAveraging": DelayedAveraging,
    "LocalSGD": LocalSGD,
}
WAITING = (SYNC, "LocalSGD")  # these wait for the slow one


class Digits(LightningModule):
    """A small CNN whose step takes `STEP_S`, or `SLOWER` times that on the slow rank."""

    def __init__(self, seed: int, slow_rank: int | None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.slow_rank, self.times = slow_rank, []
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
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def on_train_epoch_start(self):
        self.times.append(time.perf_counter())

    def on_train_end(self):
        self.times.append(time.perf_counter())


def train(name: str, seed: int, slow_rank: int | None) -> tuple[float, float]:
    """Samples a second of all processes (the first epoch left out), and test accuracy."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None][order] / 16, torch.tensor(digits.target)[order]
    loader = DataLoader(TensorDataset(x[360:], y[360:]), batch_size=BATCH, shuffle=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=STRATEGIES[name](), max_epochs=EPOCHS, **quiet)
    module = Digits(seed, slow_rank)
    trainer.fit(module, loader)
    rate = (len(x) - 360) * (EPOCHS - 1) / (module.times[-1] - module.times[1])
    with torch.no_grad():
        return rate, (module.net(x[:360]).argmax(1) == y[:360]).float().mean().item()


def workers(case: str, slow_rank: int | None, bar: float, seeds: int) -> list[Row]:
    """Speed and accuracy of each strategy against SyncDDP."""
    rates, accuracies = defaultdict(list), defaultdict(list)
    for seed in range(seeds):
        for name in STRATEGIES:
            rate, accuracy = train(name, seed, slow_rank)
            rates[name].append(rate)
            accuracies[name].append(accuracy)
    rate, table = medians(rates), []
    for name in [n for n in STRATEGIES if n != SYNC]:
        its = None if name in WAITING else bar
        table.append(compare(f"{case}: {name}", SYNC, rate[name], rate[SYNC], "samples/s", larger_is_better=True, bar=its, n=seeds))
        table.append(accuracy_row(f"{case}: {name}, accuracy", accuracies[name], accuracies[SYNC]))
    return table


def accuracy_row(row: str, ours: list[float], theirs: list[float]) -> Row:
    """`ratio` is accuracy over accuracy; `bar` is what two standard errors of the paired difference allow."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    two_errors = 2 * stdev(differences) / len(differences) ** 0.5
    return Row(row, SYNC, mean(ours), mean(theirs), "accuracy", mean(ours) / mean(theirs), 1 - two_errors / mean(theirs), len(ours))


def communication(quick: bool) -> list[Row]:
    """All-reduce by size; the two constants come from a fit that weighs every size alike (relative errors)."""
    table, n = [], 3 if quick else 9
    here = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun has started the processes, on as many machines as you like
    for processes in [int(os.environ["WORLD_SIZE"])] if here else [2, 4]:
        with TemporaryDirectory() as folder:
            if here:
                times = all_reduces(int(os.environ["RANK"]), processes, "", n)
            else:
                torch.multiprocessing.spawn(all_reduces, (processes, folder, n), processes)
                times = json.loads(Path(folder, "times").read_text())
        sent = np.array([2 * (processes - 1) / processes * size for size in BYTES])  # by each process of a ring
        design = np.stack([np.ones(len(BYTES)), sent], 1) / np.array(times)[:, None]
        latency_s, per_byte_s = np.linalg.lstsq(design, np.ones(len(BYTES)), rcond=None)[0]
        fitted = latency_s + per_byte_s * sent
        name = f"all-reduce, {processes} processes"
        table.append(Row(f"{name}: latency", "", 1e6 * latency_s, None, "us", n=n))
        table.append(Row(f"{name}: bandwidth", "", 1e-9 / per_byte_s, None, "GB/s", n=n))
        for size, seconds, model in zip(BYTES, times, fitted, strict=True):
            table.append(Row(f"{name}: {size // 1024} KiB", "latency + bytes/bandwidth", 1e6 * seconds, 1e6 * model, "us", n=n))
    return table


def all_reduces(rank: int, processes: int, folder: str, n: int) -> list[float]:
    """Median seconds of an all-reduce for each size, rounds interleaved; processes meet in `folder`, or where torchrun says."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet" if folder else "env://"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=processes)
    rounds = []
    for _ in range(n + 1):
        rounds.append([])
        for size in BYTES:
            data, repeats = torch.zeros(size // 4), max(3, min(50, 2**20 // size))
            dist.barrier()
            began = time.perf_counter()
            for _ in range(repeats):
                dist.all_reduce(data)
            rounds[-1].append((time.perf_counter() - began) / repeats)
    times = np.median(rounds[1:], 0).tolist()
    if folder and rank == 0:
        Path(folder, "times").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()
    return times


GROUPS = {
    "straggler": lambda quick: workers(f"{SLOWER}x straggler", 1, 1.8, 2 if quick else 5),
    "equal": lambda quick: workers("equal workers", None, 0.97, 2 if quick else 5),
    "communication": communication,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds, three rounds")
    parser.add_argument("--only", choices=GROUPS, help="one group")
    parser.add_argument("--json")
    options = parser.parse_args()
    started = "TORCHELASTIC_RUN_ID" in os.environ
    first = int(os.environ.get("RANK" if started else "LOCAL_RANK", 0)) == 0  # Lightning starts this script again for the second worker
    table = []
    for name in [options.only] if options.only else GROUPS:
        if first or started or name != "communication":
            table += GROUPS[name](options.quick)
    if first:
        report(table, options.json)


if __name__ == "__main__":
    main()
