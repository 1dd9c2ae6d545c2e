"""Train the head first, then stage by stage downwards: by epoch, or whenever the validation stops improving.

What is frozen is a function of the epoch (or of the monitored values so far, which are saved), so a resumed run freezes exactly what
the uninterrupted one did. All parameters are in the optimizer from the start, so no scheduler loses its place; frozen ones have no
gradient and are skipped. Frozen stages are constants: batch norm keeps its statistics and dropout is off.

Source: Howard & Ruder 2018, arXiv:1801.06146, section 3.3; CS231n 2016, lecture 11 (how much to finetune).
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_cnn.callbacks._sharded import sharded_problems
from lightning_cnn.errors import ConfigurationError, NoEffectWarning, raise_all
from lightning_cnn.functional.plateau import plateaus
from lightning_cnn.nn.freezing import Freezer
from lightning_cnn.nn.stages import Stage, stages

log = logging.getLogger(__name__)


class GradualUnfreezing(Callback):
    """Start with the last `unfrozen` stages trainable (the head is 1) and add one below at a time.

    One more `every` n epochs; or `at` these epochs; or, with `monitor`, after `patience` epochs without an improvement of more than
    `min_delta` (`mode` "min" or "max"). Never more than `up_to` in all: `up_to=1` trains the head alone for good.
    """

    def __init__(
        self,
        *,
        unfrozen: int = 1,
        every: int = 1,
        at: Sequence[int] | None = None,
        monitor: str | None = None,
        mode: str = "min",
        patience: int = 2,
        min_delta: float = 0.0,
        up_to: int | None = None,
        patterns: Sequence[str] | None = None,
    ) -> None:
        problems = [f"{k} must be at least 1, got {v}" for k, v in (("every", every), ("patience", patience)) if v < 1]
        problems += [f"unfrozen must be at least 0, got {unfrozen}"] if unfrozen < 0 else []
        problems += [f"mode must be 'min' or 'max', got {mode!r}"] if mode not in ("min", "max") else []
        problems += ["give at or monitor, not both"] if at is not None and monitor is not None else []
        problems += [f"up_to={up_to} is less than unfrozen={unfrozen}"] if up_to is not None and up_to < unfrozen else []
        raise_all(problems)
        self.unfrozen, self.every, self.at, self.up_to, self.patterns = unfrozen, every, at, up_to, patterns
        self.monitor, self.mode, self.patience, self.min_delta = monitor, mode, patience, min_delta
        self._seen: dict[int, float] = {}
        self._freezer = Freezer()
        self._stages: list[Stage] = []
        self._frozen = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._seen = {}
            raise_all([*sharded_problems(trainer, "GradualUnfreezing"), *_ddp_problems(trainer)])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stages = stages(pl_module, self.patterns)
        self._frozen = 0
        raise_all(_optimizer_problems(trainer, pl_module))
        if self.unfrozen >= len(self._stages):
            warnings.warn(
                f"GradualUnfreezing(unfrozen={self.unfrozen}) freezes nothing: the network has {len(self._stages)} stages.",
                NoEffectWarning,
                stacklevel=2,
            )

    def trained_stages(self, epoch: int) -> int:
        """How many stages, counted from the head, train in `epoch`."""
        if self.monitor is not None:
            sign = 1.0 if self.mode == "min" else -1.0
            more = plateaus([sign * self._seen[e] for e in sorted(self._seen) if e < epoch], self.patience, self.min_delta)
        elif self.at is not None:
            more = sum(start <= epoch for start in self.at)
        else:
            more = epoch // self.every
        return min(self.unfrozen + more, self.up_to if self.up_to is not None else len(self._stages), len(self._stages))

    # A run that resumes in the middle of an epoch gets no on_train_epoch_start.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._apply(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._apply(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._freezer.hold()

    # At the end of validation, so that a checkpoint written there knows the value; at the end of the epoch for training metrics.
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._note(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer)
        if self.monitor is not None and trainer.current_epoch not in self._seen:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ConfigurationError(f"GradualUnfreezing monitors {self.monitor!r}, which was not logged; logged: {known}.")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._freezer.undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._freezer.undo()

    def state_dict(self) -> dict[str, Any]:
        return {"seen": dict(self._seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seen = dict(state_dict["seen"])

    def _note(self, trainer: Trainer) -> None:
        if self.monitor is not None and self.monitor in trainer.callback_metrics:
            self._seen[trainer.current_epoch] = float(trainer.callback_metrics[self.monitor])

    def _apply(self, epoch: int) -> None:
        frozen = len(self._stages) - self.trained_stages(epoch)
        for stage in self._stages[frozen : self._frozen]:
            self._freezer.thaw(stage.modules, stage.parameters())
        for stage in self._stages[:frozen]:
            self._freezer.freeze(stage.modules, stage.parameters())
        if frozen != self._frozen:
            log.info("epoch %d: training %s", epoch, ", ".join(stage.name for stage in self._stages[frozen:]))
        self._frozen = frozen


def _ddp_problems(trainer: Trainer) -> list[str]:
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or strategy._ddp_kwargs.get("find_unused_parameters"):
        return []
    return ["DDP waits for gradients that frozen stages do not produce; use strategy='ddp_find_unused_parameters_true'"]


def _optimizer_problems(trainer: Trainer, model: nn.Module) -> list[str]:
    """Each parameter that may learn must be in exactly one group; by identity, since equal values are common (fresh batch norms)."""
    counts: dict[int, int] = {}
    for optimizer in trainer.optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    missing = [name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in counts]
    twice = [name for name, parameter in model.named_parameters() if counts.get(id(parameter), 0) > 1]
    problems = []
    if missing:
        problems.append(
            f"{len(missing)} parameters are in no optimizer and could never be unfrozen ({', '.join(missing[:3])}, ...): "
            "give configure_optimizers self.parameters(); GradualUnfreezing does the freezing"
        )
    if twice:
        problems.append(f"{len(twice)} parameters are in two parameter groups ({', '.join(twice[:3])}, ...): name each once")
    return problems
