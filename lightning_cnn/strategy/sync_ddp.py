"""Synchronous data parallelism: every step averages the gradients of all processes."""

import logging
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_cnn.errors import raise_all
from lightning_cnn.functional.scaling import lr_factor
from lightning_cnn.strategy._doctor import Diagnosis, batch_norms, check
from lightning_cnn.strategy._watched import Watched

log = logging.getLogger(__name__)
COMPRESSIONS = (None, "fp16", "bf16", "powersgd")
RULES = (None, "linear", "sqrt")


class SyncDDP(Watched, DDPStrategy):
    """Lightning's DDP with its fast settings on, gradient compression on CPU too, and a dead rank named within seconds.

    n processes with batch b take the same steps as one process with batch n * b. `scale_lr` multiplies the rate during the step
    by the number of processes (or its root), whatever the scheduler does and however many processes resume.

    Source: Li et al. 2020, "PyTorch Distributed", arXiv:2006.15704; Goyal et al. 2017, arXiv:1706.02677; Vogels et al. 2019 (PowerSGD),
    arXiv:1905.13727.
    """

    def __init__(
        self,
        *,
        compression: Literal["fp16", "bf16", "powersgd"] | None = None,
        rank_powersgd: int = 2,
        scale_lr: Literal["linear", "sqrt"] | None = None,
        static_graph: bool = False,
        find_unused_parameters: bool = False,
        timeout_s: float = 1800.0,
        **kwargs: Any,
    ) -> None:
        raise_all(
            [f"compression must be one of {COMPRESSIONS}, got {compression!r}"] * (compression not in COMPRESSIONS)
            + [f"scale_lr must be one of {RULES}, got {scale_lr!r}"] * (scale_lr not in RULES)
            + [f"timeout_s must be positive, got {timeout_s}"] * (timeout_s <= 0)
            + ["static_graph=True already knows which parameters are unused; drop find_unused_parameters"]
            * (static_graph and find_unused_parameters)
        )
        super().__init__(
            timeout=timedelta(seconds=timeout_s),
            static_graph=static_graph,
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=True,  # one copy of the gradients less; it changes no value
            **kwargs,
        )
        self.compression, self.rank_powersgd, self.scale_lr, self.timeout_s = compression, rank_powersgd, scale_lr, timeout_s

    def setup(self, trainer: Trainer) -> None:
        check(trainer, trainer.lightning_module)
        super().setup(trainer)

    def examine(self, trainer: Trainer, model: LightningModule) -> Diagnosis:
        local = [] if self._layer_sync else batch_norms(model)
        advice = "BatchNorm ({}, ...) uses each process's own batch; sync_batchnorm=True makes n processes equal to one"
        return Diagnosis([], [advice.format(local[0])] if local else [])

    def _register_ddp_hooks(self) -> None:
        """On every device: Lightning registers communication hooks on CUDA only, gloo runs them too."""
        assert isinstance(self.model, DistributedDataParallel)
        state, hook = self._comm_hook()
        if hook is not None:
            _register_ddp_comm_hook(self.model, state, hook, self._ddp_comm_wrapper)
        log.info("SyncDDP: %d processes, compression %s, scale_lr %s", self.world_size, self.compression, self.scale_lr)

    def _comm_hook(self) -> tuple[object, Callable | None]:
        if self.compression == "powersgd":
            state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=self.rank_powersgd, start_powerSGD_iter=10)
            return state, powerSGD_hook.powerSGD_hook
        hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook, None: self._ddp_comm_hook}
        return self._ddp_comm_state, hooks[self.compression]

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        with scaled_lr(optimizer, lr_factor(self.world_size, self.scale_lr)):
            return super().optimizer_step(optimizer, closure, model, **kwargs)


@contextmanager
def scaled_lr(optimizer: Optimizer, factor: float):
    """The optimizer with its learning rates multiplied; schedulers, monitors and checkpoints see them unscaled."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = lr
