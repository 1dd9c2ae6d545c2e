"""Local SGD: every process takes `period` steps alone, then all average their weights."""

import logging
from collections.abc import Callable
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from torch.distributed.distributed_c10d import _get_default_group
from torch.optim import Optimizer

from lightning_cnn.errors import raise_all
from lightning_cnn.strategy._doctor import Diagnosis, check, synced_norms
from lightning_cnn.strategy._watched import Watched

log = logging.getLogger(__name__)


class LocalSGD(Watched, DDPStrategy):
    """Synchronous data parallelism with `period` times less communication; the first `warmup_steps` steps all end in an average.

    With plain SGD and period=1 it is synchronous data parallelism (the average of the steps is the step of the average).

    Source: Stich 2019, arXiv:1805.09767; Lin et al. 2020 (post-local SGD), arXiv:1808.07217. Runs torch's PeriodicModelAverager.
    """

    def __init__(self, *, period: int = 4, warmup_steps: int = 0, timeout_s: float = 1800.0) -> None:
        raise_all(
            [f"period must be at least 1 step, got {period}"] * (period < 1)
            + [f"warmup_steps must not be negative, got {warmup_steps}"] * (warmup_steps < 0)
            + [f"timeout_s must be positive, got {timeout_s}"] * (timeout_s <= 0)
        )
        super().__init__(timeout=timedelta(seconds=timeout_s))
        self.period, self.warmup_steps, self.timeout_s = period, warmup_steps, timeout_s

    def setup(self, trainer: Trainer) -> None:
        check(trainer, trainer.lightning_module)
        super().setup(trainer)
        log.info("LocalSGD: %d processes average their weights every %d steps", self.world_size, self.period)

    def examine(self, trainer: Trainer, model: LightningModule) -> Diagnosis:
        synced = synced_norms(trainer, model)
        problem = "synchronised BatchNorm needs all ranks at every layer, which is what LocalSGD saves; drop sync_batchnorm"
        return Diagnosis([problem] * bool(synced), [])

    def configure_ddp(self) -> None:
        """No wrapper and no gradient reduction: one set of weights to start from, and an averager."""
        assert self.lightning_module is not None
        for tensor in chain(self.lightning_module.parameters(), self.lightning_module.buffers()):
            torch.distributed.broadcast(tensor.detach(), 0)
        self._averager, self._steps = PeriodicModelAverager(self.period), 0

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        module = self.lightning_module
        assert module is not None
        self._steps += 1
        # Validation, checkpoints and the end of an epoch see one set of weights.
        if self._steps <= self.warmup_steps or module.trainer.is_last_batch:
            average_parameters(_floats(module), _get_default_group())
        else:
            self._averager.average_parameters(module.parameters())
        return output

    def settle_to_stop(self) -> None:
        assert self.lightning_module is not None
        average_parameters(_floats(self.lightning_module), _get_default_group())


def _floats(module: nn.Module) -> Any:
    return (t for t in chain(module.parameters(), module.buffers()) if t.is_floating_point())
