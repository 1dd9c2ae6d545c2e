"""Every switch that makes training faster without another recipe, each kept only when a timed trial on this model says so.

Source: the PyTorch performance tuning guide (channels_last, fused optimizers, cudnn.benchmark); Micikevicius et al. 2018,
arXiv:1710.03740 (mixed precision); Ansel et al. 2024 (torch.compile); mallopt(3).
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_cnn.callbacks import _changes
from lightning_cnn.callbacks._trials import Allowance, Change, Trial, Undo, choose, timed
from lightning_cnn.errors import ConfigurationError, NoEffectWarning, raise_all
from lightning_cnn.functional.batch import image_key, read
from lightning_cnn.functional.roofline import bf16_units

log = logging.getLogger(__name__)
SWITCHES = ("memory", "channels_last", "benchmark", "tf32", "autocast", "fused", "compile", "graphs")
Step = Callable[[], object]
LONG_S = 900.0  # of training expected; below it compilation is not tried, because it would not be earned back


class FastTraining(Callback):
    """Try switches before the first step and keep those that pay; undo them when the fit ends.

    Trials are made only while they take no more than a share of the training ahead, as the first batch's steps predict it.

    What a switch changes of the results: `memory` and `benchmark` nothing or the order of sums, as `channels_last`, `fused` and
    `compile` do (rounding); `tf32` products of 10 bits and `autocast` of 8 bits (bfloat16; float16 with loss scaling on GPUs without
    it). Nothing else changes. The choice is saved with the checkpoint, so that a resumed run computes as before.

    Args:
        switches: Which to try, of `SWITCHES`, in this order. Those that the machine or the run cannot use are left out, with the reason.
        least: How many times faster a switch must be to stay.
        compile: Whether to try `torch.compile`: None means when a quarter of an hour of training or more lies ahead.
        trial_share: Of the training ahead, what all trials may take.

    Attributes:
        trials: What was tried, with its times.
    """

    def __init__(
        self, *, switches: Sequence[str] = SWITCHES, least: float = 1.03, compile: bool | None = None, trial_share: float = 0.1
    ) -> None:
        unknown = [name for name in switches if name not in SWITCHES]
        problems = [f"switches: {', '.join(unknown)} not known; choose of {', '.join(SWITCHES)}"] if unknown else []
        problems += [f"least must be at least 1, got {least}"] if least < 1 else []
        problems += [f"trial_share must be positive, got {trial_share}"] if trial_share <= 0 else []
        raise_all(problems)
        self.switches, self.least, self.compile, self.trial_share = tuple(switches), least, compile, trial_share
        self.trials: list[Trial] = []
        self._decided: list[str] | None = None
        self._kept: dict[str, Undo] = {}
        self._ready = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._ready = stage == "fit"
        if self._ready:
            self.trials, self._decided = [], None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._ready:
            return
        self._ready = False
        try:
            step = _changes.training_step(trainer, pl_module, read(batch, image_key(batch)))
            call_s = min(timed(step, pl_module.device, 1))
        except (ConfigurationError, TypeError, NotImplementedError, RuntimeError) as error:
            raise ConfigurationError(
                f"FastTraining times forward(image) of {type(pl_module).__name__}, which failed on this batch's images: {error} "
                "Give the module a forward that takes them, or leave FastTraining out."
            ) from error
        ahead_s = call_s * _batches_ahead(trainer)
        changes = list(self._changes(trainer, pl_module, step, ahead_s))
        resumed = self._decided is not None
        if not resumed:
            trials, self._kept = choose(changes, self.least, pl_module.device, Allowance(ahead_s, self.trial_share), call_s)
            self.trials += trials
            self._decided = trainer.strategy.broadcast(list(self._kept))
        self._agree(trainer, pl_module, step)
        if not trainer.is_global_zero:
            return  # it does as rank 0 has decided, whatever its own trials said
        as_before = f"as the checkpoint says: {', '.join(self._kept) or 'nothing'}"
        log.info("FastTraining: %s.", as_before if resumed else "; ".join(map(str, self.trials)))
        if not self._kept:
            tried = "; ".join(map(str, self.trials)) or "it was given no switch"
            warnings.warn(f"FastTraining changed nothing: {tried}.", NoEffectWarning, stacklevel=2)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._undo()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self._decided}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._decided = state_dict["kept"]

    def _agree(self, trainer: Trainer, pl_module: LightningModule, step: Step) -> None:
        """Do as rank 0, or as the checkpoint, has decided, also where this process would not have tried it."""
        decided = [name for name in self._decided or [] if name != "channels_last" or not _changes.layout_is_fixed(trainer)]
        for name in [name for name in self._kept if name not in decided]:
            self._kept.pop(name)()
        for name in decided:
            if name not in self._kept:
                self._kept[name] = _change(name, trainer, pl_module, step).apply()

    def _undo(self) -> None:
        for undo in reversed(self._kept.values()):
            undo()
        self._kept = {}

    def _changes(self, trainer: Trainer, pl_module: LightningModule, step: Step, ahead_s: float) -> Iterator[Change]:
        for name in self.switches:
            reason = self._unfit(name, trainer, pl_module, ahead_s)
            if reason:
                self.trials.append(Trial(name, note=reason))
            else:
                yield _change(name, trainer, pl_module, step)

    def _unfit(self, name: str, trainer: Trainer, pl_module: LightningModule, ahead_s: float) -> str:
        device = pl_module.device
        if name == "memory" and (device.type != "cpu" or not _changes.keeps_memory()):
            return "is for CPUs and glibc"
        if name in ("benchmark", "tf32", "graphs") and device.type != "cuda":
            return "is for GPUs"
        if name == "channels_last" and not any(p.dim() == 4 for p in pl_module.parameters()):
            return "has no convolution to change"
        if name == "channels_last" and _changes.layout_is_fixed(trainer):
            return "comes too late: DDP has laid out its buckets"
        if name == "autocast" and not _changes.plain_precision(trainer):
            return "is left to the precision you chose"
        if name == "autocast" and device.type == "cpu" and not bf16_units(device):
            return "has no units on this CPU"
        if name == "fused" and not all(map(_changes.can_be_fused, trainer.optimizers)) and self._decided is None:
            return "is not offered by this optimizer, or was set by you"
        if name in ("compile", "graphs") and not self._wants_compile(ahead_s):
            return "was not tried: it is off, or too little training lies ahead to earn it back"
        return ""

    def _wants_compile(self, ahead_s: float) -> bool:
        if self.compile is not None or self._decided is not None:
            return bool(self.compile) or bool({"compile", "graphs"} & set(self._decided or []))
        return ahead_s > LONG_S


def _batches_ahead(trainer: Trainer) -> float:
    return (trainer.estimated_stepping_batches - trainer.global_step) * trainer.accumulate_grad_batches


def _change(name: str, trainer: Trainer, pl_module: LightningModule, step: Step) -> Change:
    if name == "fused":
        return Change(name, lambda: _changes.fused(trainer.optimizers), _changes.optimizer_step(trainer.optimizers))
    return Change(name, lambda: _applied(name, trainer, pl_module), step)


def _applied(name: str, trainer: Trainer, pl_module: LightningModule) -> Undo:
    if name == "memory":
        return _changes.keep_memory()
    if name == "channels_last":
        return _changes.channels_last(pl_module)
    if name == "benchmark":
        return _changes.flag(torch.backends.cudnn, "benchmark", True)
    if name == "tf32":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        return lambda: torch.set_float32_matmul_precision(before)
    if name == "autocast":
        half = torch.bfloat16 if bf16_units(pl_module.device) else torch.float16
        return _changes.autocast(trainer, half)
    return _changes.compiled(_changes.parts(pl_module), "reduce-overhead" if name == "graphs" else None)
