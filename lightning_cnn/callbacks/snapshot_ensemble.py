"""Train one, get several: the learning rate falls to zero in cycles, and the weights at the end of each cycle are a member.

At test and prediction time the members answer together: the log of their mean probability.

Source: Huang et al. 2017, arXiv:1704.00109, equation 2.
"""

import logging
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_cnn.callbacks._sharded import sharded_problems
from lightning_cnn.errors import NoEffectWarning, raise_all
from lightning_cnn.nn.members import answering_together

log = logging.getLogger(__name__)


class SnapshotEnsemble(Callback):
    """`cycles` equal cosine cycles over the whole run; the last `use` snapshots (None: all) answer together.

    `answer=False` leaves that to `Marginalize(views=[Ensemble("snapshots")])`, which multiplies them with other views.

    The optimizer's learning rate is each cycle's start, so the module must have no scheduler of its own. `members` are state dicts,
    oldest first, on the CPU; they travel in checkpoints.
    """

    def __init__(self, *, cycles: int = 5, use: int | None = None, answer: bool = True) -> None:
        problems = [f"cycles must be at least 1, got {cycles}"] if cycles < 1 else []
        problems += [f"use must be between 1 and cycles={cycles}, got {use}"] if use is not None and not 1 <= use <= cycles else []
        raise_all(problems)
        self.cycles, self.use, self.answer = cycles, use, answer
        self.members: list[dict[str, Tensor]] = []
        self._cycle_steps = 1
        self._step = 0
        self._base: dict[int, Any] = {}
        self._undo: list[Callable[[], Any]] = []
        self._answering: AbstractContextManager | None = None
        self._calls = [0]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.members = []
            raise_all(sharded_problems(trainer, "SnapshotEnsemble"))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.lr_scheduler_configs:
            raise_all(["SnapshotEnsemble is a learning-rate schedule, and the module has one of its own: return the optimizer alone"])
        for optimizer in trainer.optimizers:
            self._undo.append(optimizer.register_step_pre_hook(self._anneal).remove)
            self._undo.append(optimizer.register_step_post_hook(self._restore).remove)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps) or steps < self.cycles:
            raise_all([f"{self.cycles} cycles need a run of known length with at least as many steps, got {steps}: set max_epochs"])
        self._cycle_steps = math.ceil(steps / self.cycles)
        log.info("%d snapshots, one every %d steps", self.cycles, self._cycle_steps)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = trainer.global_step
        if done > self._step and (done % self._cycle_steps == 0 or done == trainer.estimated_stepping_batches):
            self.members.append({name: tensor.detach().cpu().clone() for name, tensor in pl_module.state_dict().items()})

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._answer(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._answer(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fall_silent()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fall_silent()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._clear(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._calls[0] += 1  # the exception speaks; no second complaint
        self._clear(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"members": self.members}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.members = list(state_dict["members"])

    def factor(self, step: int) -> float:
        """The multiple of the learning rate in `step` (counted from 0)."""
        return 0.5 * (math.cos(math.pi * (step % self._cycle_steps) / self._cycle_steps) + 1)

    def _anneal(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            self._base[id(group)] = group["lr"]
            group["lr"] = group["lr"] * self.factor(self._step)

    def _restore(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self._base.pop(id(group), group["lr"])

    @property
    def served(self) -> list[dict[str, Tensor]]:
        """The members that answer."""
        return self.members[-(self.use or len(self.members)) :] if self.members else []

    def _answer(self, pl_module: LightningModule) -> None:
        if not self.answer:
            return
        if len(self.members) < 2:
            warnings.warn(f"SnapshotEnsemble has {len(self.members)} members: train with it first.", NoEffectWarning, stacklevel=3)
            return
        here = [{name: tensor.to(pl_module.device) for name, tensor in member.items()} for member in self.served]
        self._answering = answering_together(pl_module, here)
        self._calls = self._answering.__enter__()

    def _fall_silent(self) -> None:
        if self._answering is None:
            return
        self._answering.__exit__(None, None, None)
        self._answering = None
        if not self._calls[0]:
            warnings.warn(
                "SnapshotEnsemble: the step never called the module's forward; call self(x) in it.", NoEffectWarning, stacklevel=3
            )

    def _clear(self, trainer: Trainer) -> None:
        self._fall_silent()
        for optimizer in trainer.optimizers:
            self._restore(optimizer, (), {})
        while self._undo:
            self._undo.pop()()
