"""The account of one fit: the steps as the stopwatch hands them in, the pictures in them, and what one of them is made of."""

import re
import resource
import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._pytree import tree_leaves

from lightning_cnn.callbacks._cpu_clock import WorkerClock
from lightning_cnn.callbacks._device_clock import DeviceClock
from lightning_cnn.callbacks._stopwatch import Stopwatch
from lightning_cnn.callbacks._timeline import Timeline
from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.batch import image_key, read
from lightning_cnn.functional.bottleneck import STAGES, Measurement
from lightning_cnn.functional.roofline import roofline
from lightning_cnn.functional.step_probe import StepProbe

WARM_UP = 1  # steps before the one that is looked at operation by operation; those after it are counted


class Account:
    """Everything between `on_train_start` and `on_train_end`."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule, trace_steps: int) -> None:
        self.device = pl_module.device
        clock = DeviceClock(lambda: torch.cuda.Event(enable_timing=True)) if self.device.type == "cuda" else None
        self.timeline, self.workers = Timeline(), WorkerClock()
        self.sums, self.steps, self.images = [0.0] * len(STAGES), 0, 0
        self.pinned = _pinned(trainer) if self.device.type == "cuda" else None
        self.probe: StepProbe | None = None
        self.trace: list[tuple[str, str, float]] = []
        self._begun = 0
        self._looking = False
        self._trace_steps = trace_steps
        self.watch = Stopwatch(self._step, clock)
        self.watch.attach(trainer)

    def batch_begins(self, pl_module: LightningModule, batch: Any) -> None:
        self._begun += 1
        if self._begun > WARM_UP + 1:
            self.images += pictures(batch)
        elif self._begun == WARM_UP + 1 and not compiled(pl_module):
            # Entered last and left first: callbacks that run before the step do not see it.
            self.probe, self._looking = StepProbe(self._in_training_step), True
            self.probe.__enter__()

    def batch_ends(self) -> None:
        if self._looking and self.probe is not None:
            self._looking = False
            self.probe.__exit__(None, None, None)

    def close(self) -> None:
        """Give everything back; what was counted stays."""
        self.batch_ends()
        self.watch.end_step()
        self.watch.detach()
        if self.watch.device is not None:
            torch.cuda.synchronize(self.device)
            self.watch.device.harvest()

    def measured(self) -> Measurement:
        probe, clock = self.probe or StepProbe(), self.watch.device
        dtype = max(probe.flops, key=lambda kind: probe.flops[kind], default=torch.float32)
        best = roofline(self.device, dtype)
        stages = dict(zip(STAGES, (total / self.steps for total in self.sums), strict=True))
        if clock is not None and clock.steps:
            stages = {name: clock.seconds.get(name, 0.0) / clock.steps for name in STAGES}
        return Measurement(
            stages=stages,
            images=self.images / self.steps,
            cpu_share=self._cpu_share(),
            workers=self.workers.workers,
            pinned=self.pinned,
            reads=probe.reads,
            operations=probe.operations,
            operation_s=best.operation_s,
            slowest_callback=self._slowest_callback(),
            flops=sum(probe.flops.values()),
            peak_flops_per_s=best.flops_per_s,
            device=self.device.type,
        )

    def memory_bytes(self) -> int:
        """The most that was in use: of the GPU's memory, else of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def _step(self, row: list[float]) -> None:
        """Called at each fetch: with what came before the first step, then with each step."""
        if self._begun > WARM_UP + 1:
            self._count(row)
        elif self._begun == WARM_UP + 1:
            self.watch.forget()
            self.workers = WorkerClock()
            self.watch.trace = self.trace if self._trace_steps else None

    def _count(self, row: list[float]) -> None:
        self.steps += 1
        self.sums = [a + b for a, b in zip(self.sums, row, strict=True)]
        self.timeline.add(row)
        if self.steps == self._trace_steps:
            self.watch.trace = None

    def _in_training_step(self) -> bool:
        return self.watch.running[-1].stage in ("forward", "callbacks")

    def _cpu_share(self) -> float | None:
        waited = self.sums[STAGES.index("data")]
        own = self.watch.cpu_s / waited if waited else 0.0
        share = self.workers.share()
        return own if not self.workers.workers else None if share is None else max(own, share)

    def _slowest_callback(self) -> tuple[str, float]:
        by_name: dict[str, float] = {}
        for span in self.watch.spans.values():
            if span.stage == "callbacks":
                name = re.sub(r"^\[\w+\]|\{.*\}", "", span.action)
                by_name[name] = by_name.get(name, 0.0) + span.total / self.steps
        return max(by_name.items(), key=lambda item: item[1], default=("", 0.0))


def pictures(batch: Any) -> int:
    """How many there are in any batch: of its images, else the length of its first tensor."""
    try:
        return len(read(batch, image_key(batch)))
    except (ConfigurationError, TypeError):
        return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()), 0)


def compiled(model: torch.nn.Module) -> bool:
    """Whether some of it is compiled: such code would run uncompiled under a look at its operations."""
    return any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in model.modules())


def _pinned(trainer: Trainer) -> bool | None:
    loader: Any = trainer.train_dataloader
    return getattr(getattr(loader, "_loader", loader), "pin_memory", None)
