"""What safety costs a step: saving, exact resume, and the guard against NaN.

    python benchmarks/reliability.py [--quick] [--json FILE] [--only saving|step ...]

`saving`: seconds that a training loop waits for `save_checkpoint` of a ResNet-18 with Adam's state (134 MB), against Lightning's own
checkpoint plugins. `step`: milliseconds a step of a small network through a Trainer, with and without each callback, interleaved.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import _bench
import lightning as L
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torchvision.models import resnet18

from lightning_cnn.callbacks import ExactResume, NaNGuard
from lightning_cnn.checkpoint import SafeCheckpointIO
from lightning_cnn.data import Resumable

PAUSE_S = 1.0  # of training between two saves


def checkpoint() -> dict:
    network = resnet18()
    optimizer = torch.optim.Adam(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {"state_dict": network.state_dict(), "optimizer_states": [optimizer.state_dict()], "epoch": 0, "global_step": 1}


def saving(rounds: int) -> list[_bench.Row]:
    state, waits = checkpoint(), {}
    makers = {
        "SafeCheckpointIO": SafeCheckpointIO,
        "SafeCheckpointIO, in the step": lambda: SafeCheckpointIO(background=False),
        "TorchCheckpointIO": TorchCheckpointIO,
        "AsyncCheckpointIO": lambda: AsyncCheckpointIO(TorchCheckpointIO()),
    }
    with tempfile.TemporaryDirectory() as folder:
        plugins = {name: make() for name, make in makers.items()}

        def wait(name: str) -> float:
            took = _bench.seconds(lambda: plugins[name].save_checkpoint(state, str(Path(folder) / f"{name}.ckpt")))
            time.sleep(PAUSE_S)  # what is written beside training has the time to be
            return took

        waits = _bench.medians(_bench.interleave({name: lambda n=name: wait(n) for name in makers}, rounds))
        for plugin in plugins.values():
            plugin.teardown()
    rows = [("SafeCheckpointIO", peer) for peer in ("TorchCheckpointIO", "AsyncCheckpointIO")]
    rows.append(("SafeCheckpointIO, in the step", "TorchCheckpointIO"))
    lower = {"larger_is_better": False, "n": rounds}
    return [
        _bench.compare(f"wait for a save: {ours}", peer, waits[ours] * 1e3, waits[peer] * 1e3, "ms", **lower) for ours, peer in rows
    ]


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        convolutions = [torch.nn.Conv2d(c, 32, 3, padding=1) for c in (3, 32, 32, 32)]
        self.network = torch.nn.Sequential(*convolutions, torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.LazyLinear(10))
        self.network(torch.zeros(1, 3, 16, 16))

    def training_step(self, batch, batch_index: int):
        return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def fit(callbacks: list, steps: int) -> float:
    """Milliseconds a step, its median."""
    times: list[float] = []

    class Clock(L.Callback):
        def on_train_batch_start(self, *_) -> None:
            times.append(time.perf_counter())

    data = [(torch.rand(3, 16, 16), k % 10) for k in range(16)]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[*callbacks, Clock()], **quiet)
    trainer.fit(Small(), Resumable(data, batch_size=16, num_workers=0))
    return median(b - a for a, b in pairwise(times[5:])) * 1e3


def step(rounds: int) -> list[_bench.Row]:
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Callable[[], list]] = {
            "ExactResume": lambda: [ExactResume(signals=[])],
            "NaNGuard(stop)": lambda: [NaNGuard(folder=folder)],
            "NaNGuard(rollback)": lambda: [NaNGuard(action="rollback", folder=folder)],
        }
        runs = {"without": lambda: fit([], 60)} | {name: lambda make=make: fit(make(), 60) for name, make in made.items()}
        found = _bench.interleave(runs, rounds)
    paired = {name: median(a - b for a, b in zip(found[name], found["without"], strict=True)) for name in made}
    base = median(found["without"])
    lower = {"larger_is_better": False, "n": rounds}
    return [_bench.compare(f"a step with {name}", "without it", base + more, base, "ms", **lower) for name, more in paired.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--only", nargs="*", default=["saving", "step"], choices=["saving", "step"])
    options = parser.parse_args()
    rounds = 3 if options.quick else 9
    groups = {"saving": saving, "step": step}
    _bench.report([row for name in options.only for row in groups[name](rounds)], options.json)


if __name__ == "__main__":
    main()
