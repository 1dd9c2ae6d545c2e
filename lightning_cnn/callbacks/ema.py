"""Validate and finish with an exponential moving average of the weights.

The average starts as the weights of its first update and its decay grows from there, so untrained weights never enter it; before the
first update the model validates as it is. Swapped in for validation, swapped out after it or after an exception. A checkpoint's
`state_dict` holds the average (what was validated); a resumed run gets its training weights back from beside it.

Source: Polyak & Juditsky 1992; Szegedy et al. 2016, arXiv:1512.00567, section 8; the warm-up is TensorFlow's.
"""

import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_cnn.callbacks._sharded import sharded_problems
from lightning_cnn.errors import NoEffectWarning, raise_all
from lightning_cnn.functional.weights import ema_decay

log = logging.getLogger(__name__)
TRAINING_WEIGHTS = "ema_training_weights"


class EMA(Callback):
    """Average with `decay` after every `every`-th optimizer step from step `start` on. Running statistics are averaged alike."""

    def __init__(self, *, decay: float = 0.999, start: int = 0, every: int = 1) -> None:
        problems = [f"decay must be in [0, 1), got {decay}"] if not 0 <= decay < 1 else []
        problems += [f"start must be at least 0, got {start}"] if start < 0 else []
        problems += [f"every must be at least 1, got {every}"] if every < 1 else []
        raise_all(problems)
        self.decay, self.start, self.every = decay, start, every
        self._reset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            raise_all(sharded_problems(trainer, "EMA"))
            self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log.info("EMA of the weights: decay %g, from step %d, every %d", self.decay, self.start, self.every)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step  # stands still while gradients accumulate
        if step > self._last_step and step > self.start and step % self.every == 0:
            self._update(pl_module)
            self._last_step = step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_out(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._average:
            warnings.warn(
                f"EMA never averaged: training ended after {trainer.global_step} steps and start={self.start}, every={self.every}. "
                "The model keeps its training weights.",
                NoEffectWarning,
                stacklevel=2,
            )
        self._swap_in(pl_module)  # for good; a checkpoint written after this still knows the training weights

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap_out(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._reset()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average:
            now = checkpoint["state_dict"]
            checkpoint[TRAINING_WEIGHTS] = {name: self._training.get(name, tensor) for name, tensor in now.items()}
            checkpoint["state_dict"] = {n: self._average[n].to(t.dtype) if n in self._average else t for n, t in now.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING and TRAINING_WEIGHTS in checkpoint:
            pl_module.load_state_dict(checkpoint[TRAINING_WEIGHTS])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "last_step": self._last_step, "average": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates, self._last_step = state_dict["updates"], state_dict["last_step"]
        self._average = {name: tensor.clone() for name, tensor in state_dict["average"].items()}

    def _reset(self) -> None:
        self._updates = self._last_step = 0
        self._average: dict[str, Tensor] = {}
        self._training: dict[str, Tensor] = {}

    @torch.no_grad()
    def _update(self, pl_module: LightningModule) -> None:
        now = _averaged(pl_module)
        decay = ema_decay(self._updates, self.decay)
        self._updates += 1
        if decay == 0:
            # At least float32: a bf16 average would lose updates smaller than 1/256 of itself.
            self._average = {
                name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True) for name, tensor in now.items()
            }
            return
        self._average = {name: self._average[name].to(tensor.device) for name, tensor in now.items()}
        means = list(self._average.values())
        latest = [tensor.to(mean.dtype) for tensor, mean in zip(now.values(), means, strict=True)]
        torch._foreach_lerp_(means, latest, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def _swap_in(self, pl_module: LightningModule) -> None:
        if not self._average or self._training:
            return
        now = _averaged(pl_module)
        self._training = {name: tensor.detach().clone() for name, tensor in now.items()}
        for name, tensor in now.items():
            tensor.copy_(self._average[name])

    @torch.no_grad()
    def _swap_out(self, pl_module: LightningModule) -> None:
        for name, tensor in _averaged(pl_module).items():
            if name in self._training:
                tensor.copy_(self._training[name])
        self._training = {}


def _averaged(pl_module: LightningModule) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in pl_module.state_dict(keep_vars=True).items() if tensor.is_floating_point()}
