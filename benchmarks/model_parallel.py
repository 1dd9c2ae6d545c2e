"""Idle time and step time of every pipeline schedule beside theory, and memory a rank of Pipeline and Spatial beside one process.

    python benchmarks/model_parallel.py [--quick] [--json FILE] [--only bubble|memory]

Two gloo processes of one thread each.

bubble: sleeps stand in for arithmetic (50 ms forward a process and micro-batch, 50 for the gradient of the input, 50 for the weights'), so
that processes are equally fast on any machine. What every stage takes is timed in the same steps: idle is the share of a step in which a
process does none of it, mean of both. Theory is (p - 1) / (m + p - 1) for gpipe and 1f1b; for the others it is the engine's own table of
actions, played with what each of them took in the same step and messages that cost nothing. Where theory leaves next to no idle time (zb),
a quotient of idle times says how small the smaller one is; "step" is what a user waits for: a whole step beside one with no idle time but
theory's.

memory: highest resident size of a process in the second step of training a ResNet-18 (GroupNorm, AdamW, 8 pictures of 192 pixels), above
that of the same process before the model was made, median of three runs. glibc is told to return freed memory, so that this is what is
alive at once.
"""

import argparse
import faulthandler
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from _bench import Row, compare, report
from torch import nn

from lightning_cnn.strategy._stages import SCHEDULES, Runner

RANKS, WORK_S, LIMIT_S = 2, 0.05, 85
Costs = dict[tuple[str, int, int], float]  # (F, B: backward, I and W: of input and weights alone; stage; micro-batch) -> seconds


# -- bubble ---------------------------------------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """Takes `seconds` forward, as long for the gradient of its input, and again for that of its weights."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.bias, self.weight = seconds, nn.Parameter(torch.zeros(8)), nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # the bias makes the first stage owe a gradient like the others
        return Sleep.apply(x + self.bias, self.seconds, self.seconds) * Sleep.apply(self.weight, 0.0, self.seconds)


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward_s: float, backward_s: float) -> torch.Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        time.sleep(ctx.backward_s)
        return gradient[0], None, None


class Timed:
    """Times what a rank's stages compute."""

    def __init__(self, runner: Runner) -> None:
        self.seconds: Costs = {}
        for stage in getattr(runner.schedule, "_stages", None) or [runner.schedule._stage]:
            for method in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
                setattr(stage, method, self._timed(method, stage.stage_index, getattr(stage, method)))

    def _timed(self, method: str, stage: int, compute: Callable) -> Callable:
        def timed(micro: int, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = compute(micro, *args, **kwargs)
            full = kwargs.get("full_backward", True)
            kind = {"forward_one_chunk": "F", "backward_one_chunk": "B" if full else "I"}.get(method, "W")
            self.seconds[kind, stage, micro] = time.perf_counter() - start
            return result

        return timed


def ideal(name: str, runner: Runner, costs: Costs) -> tuple[float, float]:
    """The idle share that the schedule itself cannot avoid, and the seconds of a step with no other."""
    work_s = sum(costs.values()) / RANKS
    if SCHEDULES[name][1] == 1:
        share = (RANKS - 1) / (runner.micro_batches + RANKS - 1)
        return share, work_s / (1 - share)
    queues = {
        rank: [
            (a.computation_type.value, a.stage_index, a.microbatch_index) for a in actions if a and a.computation_type.value in "FBIW"
        ]
        for rank, actions in runner.schedule.pipeline_order.items()
    }
    step_s = play(queues, costs)
    return 1 - work_s / step_s, step_s


def play(queues: dict[int, list[tuple[str, int, int]]], costs: Costs) -> float:
    """When the last process is done, if each does its actions in order as soon as their inputs are there."""
    stages = 1 + max(stage for queue in queues.values() for _, stage, _ in queue)
    clocks, ends = dict.fromkeys(queues, 0.0), {}
    while any(queues.values()):
        before = len(ends)
        for rank, queue in queues.items():
            while queue:
                kind, stage, micro = queue[0]
                source = {"F": ("F", stage - 1), "W": ("back", stage)}.get(kind, ("back", stage + 1))
                if 0 <= source[1] < stages and (*source, micro) not in ends:
                    break
                queue.pop(0)
                clocks[rank] = max(clocks[rank], ends.get((*source, micro), 0.0)) + costs[kind, stage, micro]
                ends["back" if kind in "BI" else kind, stage, micro] = clocks[rank]
        if len(ends) == before:
            raise RuntimeError(f"the table of actions waits for itself at {[queue[0] for queue in queues.values() if queue]}")
    return max(clocks.values())


def bubble(out: Path, steps: int) -> None:
    """One of two processes."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)  # a hang shows where, and ends
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=int(os.environ["RANK"]), world_size=RANKS)
    found = [(name, micro, *idle(name, micro, steps)) for name in SCHEDULES for micro in (2, 4, 8)]
    if dist.get_rank() == 0:
        (out / "bubble.json").write_text(json.dumps(found))
    dist.barrier()


def idle(name: str, micro_batches: int, steps: int) -> tuple[float, ...]:
    """Share and seconds of a step as measured, and share and seconds in theory."""
    each = SCHEDULES[name][1]
    stages: list[nn.Module] = [Stage(WORK_S / each) for _ in range(RANKS * each)]
    pictures = torch.randn(micro_batches, 8)
    runner = Runner(stages, pictures, name, micro_batches, torch.device("cpu"), nullcontext, lambda answer, rows: answer.sum())
    timed, rounds = Timed(runner), []
    for _ in range(steps + 1):  # the first one meets the other process, and fills caches
        dist.barrier()
        start = time.perf_counter()
        runner.train(pictures)
        rounds.append((time.perf_counter() - start, dict(timed.seconds)))
    everybody: list[Any] = [None] * RANKS
    dist.all_gather_object(everybody, rounds[1:])
    found = []
    for both in zip(*everybody, strict=True):
        shares = [1 - sum(costs.values()) / wall for wall, costs in both]
        found.append((fmean(shares), max(wall for wall, _ in both), *ideal(name, runner, both[0][1] | both[1][1])))
    return tuple(map(median, zip(*found, strict=True)))


# -- memory ---------------------------------------------------------------------------------------------------------------------------


def memory(out: Path, which: str, size_px: int) -> None:
    """One process of a training; the launcher starts the other."""
    from lightning.pytorch import LightningModule, Trainer
    from torchvision.models import resnet18

    from lightning_cnn.strategy import Pipeline, Spatial

    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = resnet18(norm_layer=lambda channels: nn.GroupNorm(8, channels))

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    nn.Conv2d(3, 8, 3)(torch.randn(1, 3, 32, 32)).sum().backward()  # loads the libraries
    before = resident("VmRSS")
    strategies = {"alone": lambda: "auto", "Spatial": lambda: Spatial(height=2), "Pipeline": lambda: Pipeline(micro_batches=4)}
    trainer = Trainer(
        accelerator="cpu", devices=1 if which == "alone" else RANKS, strategy=strategies[which](), max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, size_px, size_px, generator=generator), torch.arange(8)) for _ in range(2)]
    trainer.fit(Net(), torch.utils.data.DataLoader(batches, batch_size=None))
    (out / f"{which}-{trainer.global_rank}.json").write_text(json.dumps(resident("VmHWM") - before))


def resident(what: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


# -- the two groups -------------------------------------------------------------------------------------------------------------------


def side_by_side(jobs: list[tuple[list[str], dict[str, str]]]) -> None:
    """Run this script once for each list of arguments, with these additions to the environment, at the same time."""
    common = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([sys.executable, __file__, "--worker", *arguments], env=common | more) for arguments, more in jobs]
    if any([worker.wait(timeout=LIMIT_S + 30) for worker in workers]):
        raise SystemExit(f"a process failed; they were {[arguments for arguments, _ in jobs]}")


def bubble_rows(out: Path, quick: bool) -> list[Row]:
    steps = 1 if quick else 3
    side_by_side([(["bubble", str(out), str(steps)], {"RANK": str(rank)}) for rank in range(RANKS)])
    found = json.loads((out / "bubble.json").read_text())
    bar = 1 / 1.25  # within 1.25x of theory
    common: dict[str, Any] = {"larger_is_better": False, "n": steps}
    table = []
    for name, micro, idle_share, step_s, least, least_s in found:
        table.append(compare(f"bubble: {name}, {micro} micro-batches", "theory", idle_share, least, "idle", bar=bar, **common))
        table.append(compare(f"step: {name}, {micro} micro-batches", "theory", 1000 * step_s, 1000 * least_s, "ms", **common))
    return table


def memory_rows(out: Path, quick: bool) -> list[Row]:
    size, found, runs = "96" if quick else "192", defaultdict(list), 1 if quick else 3
    for which in (["alone", "Spatial"], ["Pipeline"]) * runs:  # Pipeline by itself: it cuts by measured time
        side_by_side([([name, str(out), size], {"MALLOC_MMAP_THRESHOLD_": "65536"}) for name in which])
        for path in [path for name in which for path in out.glob(f"{name}-?.json")]:
            found[path.stem].append(json.loads(path.read_text()))
    mib = {name: median(values) for name, values in found.items()}
    return [
        compare(f"memory: {which}, rank {rank}", "one process", mib[f"{which}-{rank}"], mib["alone-0"], "MiB", larger_is_better=False, n=runs)
        for which in ("Pipeline", "Spatial")
        for rank in range(RANKS)
    ]  # fmt: skip


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one step, smaller pictures")
    parser.add_argument("--json")
    groups = {"bubble": bubble_rows, "memory": memory_rows}
    parser.add_argument("--only", default="", choices=["", *groups])
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        which, folder, number = options.worker
        bubble(Path(folder), int(number)) if which == "bubble" else memory(Path(folder), which, int(number))
    else:
        table: list[Row] = []
        for group in [options.only] if options.only else groups:
            with tempfile.TemporaryDirectory() as folder:
                table += groups[group](Path(folder), options.quick)
        report(table, options.json)
