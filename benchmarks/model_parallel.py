"""Idle time of every pipeline schedule beside theory, and memory a rank of Pipeline and Spatial beside one process.

    python benchmarks/model_parallel.py [--quick] [--json FILE] [--only bubble|memory]

Two gloo processes. bubble: the arithmetic of a larger net is stood in for by sleeps (forward T, gradient of the input T, gradient of the
weights T), so that both processes are equally fast on any machine; theory is the engine's own table of actions, played with these
times and messages that cost nothing (for gpipe and 1f1b it is 1 / (m + 1)). memory: the highest resident size of a process during two
steps, above what it had before them; ResNet-18 with GroupNorm, AdamW, pictures of 224 pixels.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from statistics import median

warnings.filterwarnings("ignore")
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)

import torch
import torch.distributed as dist
from _bench import Row, report
from torch import nn

from lightning_cnn.strategy._stages import SCHEDULES, Runner

torch.set_num_threads(1)
WORK_S = 0.04  # forward time of a rank and micro-batch; the backward pass takes twice that
MICRO_BATCHES = (2, 4, 8)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward_s, backward_s):
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward_s)
        return gradient, None, None


class Stage(nn.Module):
    """Takes `seconds` forward, for the gradient of its input, and for that of its weights."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.first, self.weight = seconds, nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return _Sleep.apply(self.first(x), self.seconds, self.seconds) * _Sleep.apply(self.weight, 0.0, self.seconds)


def theory(runner: Runner, ranks: int, each_s: float) -> float:
    """The time of a step that the engine's table allows."""
    engine = runner.schedule
    table = getattr(engine, "pipeline_order", None) or engine._get_pipeline_order()
    # The engine leaves the whole backward pass of the first stage, which owes nobody a gradient, to the action for the weights.
    costs = {"F": (1, 1), "B": (2, 2), "I": (0, 1), "W": (2, 1)}
    ends: dict[tuple, float] = {}
    clocks, left = [0.0] * ranks, {rank: [a for a in actions if a is not None] for rank, actions in table.items()}
    stages = 1 + max(action.stage_index for actions in left.values() for action in actions)
    while any(left.values()):
        for rank, actions in left.items():
            while actions:
                stage, kind, batch = actions[0].stage_index, actions[0].computation_type.value, actions[0].microbatch_index
                before = {
                    "F": [("F", stage - 1, batch)] if stage else [],
                    "W": [("I", stage, batch)],
                }.get(kind, [("F", stage, batch)] + ([("back", stage + 1, batch)] if stage + 1 < stages else []))
                if any(key not in ends for key in before):
                    break
                actions.pop(0)
                clocks[rank] = max([clocks[rank], *(ends[key] for key in before)]) + costs[kind][bool(stage)] * each_s
                for key in (kind, "back") if kind in "BI" else (kind,):
                    ends[key, stage, batch] = clocks[rank]
    return max(clocks)


def bubble(out: str, steps: int) -> None:
    """One of two processes."""
    dist.init_process_group("gloo")
    found = []
    for schedule, (_, each) in SCHEDULES.items():
        for batches in MICRO_BATCHES:
            stages = [Stage(WORK_S / each) for _ in range(2 * each)]
            runner = Runner(
                stages, torch.randn(16, 8), schedule, batches, torch.device("cpu"), nullcontext, lambda y, rows: y.square().mean()
            )
            times = []
            for _ in range(steps + 1):
                dist.barrier()
                start = time.perf_counter()
                runner.train(torch.randn(16, 8))
                dist.barrier()
                times.append(time.perf_counter() - start)
            work = 3 * WORK_S * batches
            found.append((schedule, batches, 1 - work / median(times[1:]), 1 - work / theory(runner, 2, WORK_S / each)))
    if dist.get_rank() == 0:
        Path(out, "bubble.json").write_text(json.dumps(found))
    dist.barrier()


def memory(out: str, which: str, size_px: int) -> None:
    """One process of a training; the launcher starts the other."""
    from lightning.pytorch import LightningModule, Trainer
    from torchvision.models import resnet18

    from lightning_cnn.strategy import Pipeline, Spatial

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = resnet18(norm_layer=lambda channels: nn.GroupNorm(8, channels))

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

        def on_fit_start(self):
            Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
            self.before = _resident("VmRSS")

    strategies = {"alone": lambda: "auto", "Spatial": lambda: Spatial(height=2), "Pipeline": lambda: Pipeline(micro_batches=4)}
    data = [(torch.randn(3, size_px, size_px), i) for i in range(16)]
    trainer = Trainer(
        accelerator="cpu", devices=1 if which == "alone" else 2, strategy=strategies[which](), max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    model = Net()
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=8))
    Path(out, f"{which}-{trainer.global_rank}.json").write_text(json.dumps(_resident("VmHWM") - model.before))


def _resident(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def rows(only: str, quick: bool) -> list[Row]:
    table = []
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--worker"]
        if only in ("", "bubble"):
            env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777", "WORLD_SIZE": "2"}
            steps = "1" if quick else "3"
            ranks = [subprocess.Popen([*command, "bubble", out, steps], env={**env, "RANK": str(rank)}) for rank in range(2)]
            if any([process.wait() for process in ranks]):
                raise SystemExit("a process of the bubble group failed")
            for schedule, batches, measured, ideal in json.loads(Path(out, "bubble.json").read_text()):
                name = f"bubble: {schedule}, {batches} micro-batches"
                ratio = ideal / measured if measured > 0 else float("inf")
                table.append(Row(name, "theory", measured, ideal, "idle", ratio, 0.8, int(steps)))
        if only in ("", "memory"):
            size = "96" if quick else "224"
            for which in ("alone", "Spatial", "Pipeline"):
                subprocess.run([*command, which, out, size], check=True)
            alone = json.loads(Path(out, "alone-0.json").read_text())
            for which in ("Spatial", "Pipeline"):
                for rank in range(2):
                    ours = json.loads(Path(out, f"{which}-{rank}.json").read_text())
                    table.append(Row(f"memory: {which}, rank {rank}", "one process", ours, alone, "MiB", alone / ours, None, 1))
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one step, smaller pictures")
    parser.add_argument("--json")
    parser.add_argument("--only", default="", choices=["", "bubble", "memory"])
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        which, out, number = options.worker
        bubble(out, int(number)) if which == "bubble" else memory(out, which, int(number))
    else:
        report(rows(options.only, options.quick), options.json)
