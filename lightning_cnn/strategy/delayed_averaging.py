"""Asynchronous data parallelism by averaging: every rank trains on its own weights while a snapshot of them is being averaged."""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_cnn.errors import raise_all
from lightning_cnn.strategy._apart import Apart
from lightning_cnn.strategy._team import gloo_group

log = logging.getLogger(__name__)


class DelayedAveraging(Apart):
    """Train locally; when the average of a snapshot arrives, `weights += average - snapshot`. Nobody waits for anybody.

    A round starts every `every` steps as soon as the last one has landed. Its lag (local steps between snapshot and landing) is the
    staleness, reported as a histogram. At validation, at checkpoints and at the end the ranks settle on one average, bit for bit.

    Source: Zhang et al. 2015 (EASGD), arXiv:1412.6651; Wang et al. 2020 (overlapped local SGD), arXiv:2002.09539.
    """

    def __init__(self, *, every: int = 1, steal: bool = True, timeout_s: float = 1800.0) -> None:
        raise_all(
            [f"every must be at least 1 step, got {every}"] * (every < 1)
            + [f"timeout_s must be positive, got {timeout_s}"] * (timeout_s <= 0)
        )
        super().__init__(steal=steal, timeout_s=timeout_s)
        self.every = every
        self._group: Any = None
        self._round: tuple[Any, Tensor, Tensor] | None = None

    def start(self, trainer: Trainer) -> None:
        assert self.team is not None and self.lightning_module is not None
        self.steps, self.rounds, self.lag = 0, 0, Counter[int]()
        self._parameters = [p for p in self.lightning_module.parameters() if p.requires_grad]
        self._buffers = [b for b in self.lightning_module.buffers() if b.is_floating_point()]
        store = self.team.under(self.team.fresh("averaging"))
        self._group = gloo_group(store, self.global_rank, self.world_size, self.timeout_s)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.steps += 1
        if self._round is not None and self._round[0].is_completed():
            self._land()
        if self._round is None and self.steps % self.every == 0:
            self._launch()
        return output

    def settle(self) -> None:
        """Average until every rank says that it trains no more; the last round is the same numbers for all."""
        if self._round is not None:
            self._land()
        while True:
            self._launch(finished=True)
            if self._land() == self.world_size:
                break
        self._write(self._average)
        said = self.meet("report", (self.steps, self.lag))
        lags = sum((lag for _, lag in said), Counter[int]())
        self.report = {"steps": [steps for steps, _ in said], "rounds": self.rounds, "staleness": dict(sorted(lags.items()))}
        log.info("DelayedAveraging: steps by rank %s, %d rounds, lag in steps %s", *self.report.values())

    def teardown(self) -> None:
        self._group, self._round = None, None
        super().teardown()

    def _launch(self, finished: bool = False) -> None:
        assert self._group is not None
        snapshot = self._read()
        buffer = torch.cat([snapshot, snapshot.new_tensor([float(finished)])])
        self._round, self._launched = (self._group.allreduce([buffer]), buffer, snapshot), self.steps

    def _land(self) -> int:
        """Wait for the round, apply it, and say how many ranks had finished when it started."""
        assert self._round is not None
        work, buffer, snapshot = self._round
        work.wait()
        self._round, self.rounds = None, self.rounds + 1
        self.lag[self.steps - self._launched] += 1
        self._average = buffer[:-1] / self.world_size
        self._write(self._read() + (self._average - snapshot))
        return int(buffer[-1])

    def _read(self) -> Tensor:
        tensors = (*self._parameters, *self._buffers)
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        return torch.cat([t.detach().flatten().to("cpu", dtype) for t in tensors])

    def _write(self, flat: Tensor) -> None:
        start = 0
        with torch.no_grad():
            for tensor in (*self._parameters, *self._buffers):
                tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
                start += tensor.numel()
