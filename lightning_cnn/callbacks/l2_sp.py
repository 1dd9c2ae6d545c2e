"""Pull finetuned weights towards where they started instead of towards zero.

Plain weight decay forgets the pretrained features; this penalty, alpha/2 * |w - w0|^2 on the pretrained layers and beta/2 * |w|^2 on
the new head, keeps what the new data do not contradict. Its gradient is added once a step, after unscaling and before clipping.

Source: Li, Grandvalet & Davoine 2018, arXiv:1802.01483, equation 2. As there, only weights are pulled, not biases and norms.
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_cnn.callbacks._sharded import sharded_problems
from lightning_cnn.errors import NoEffectWarning, raise_all
from lightning_cnn.functional.weights import l2_sp_gradient_
from lightning_cnn.nn.stages import stages

log = logging.getLogger(__name__)


class L2SP(Callback):
    """`alpha` for everything below the head, `beta` for the head. Set the optimizer's own weight_decay to 0."""

    def __init__(self, *, alpha: float = 0.01, beta: float = 0.01, patterns: Sequence[str] | None = None) -> None:
        raise_all(f"{name} must be at least 0, got {value}" for name, value in (("alpha", alpha), ("beta", beta)) if value < 0)
        self.alpha, self.beta, self.patterns = alpha, beta, patterns
        self._anchors: dict[str, Tensor] = {}
        self._pulls: list[tuple[Tensor, Tensor, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._anchors = {}
            raise_all(sharded_problems(trainer, "L2SP"))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        head = {id(parameter) for parameter in stages(pl_module, self.patterns)[-1].parameters()}
        self._pulls = []
        for name, weight in pl_module.named_parameters():
            if weight.dim() < 2:
                continue
            if id(weight) in head:
                self._pulls.append((weight, torch.zeros((), device=weight.device), self.beta))
                continue
            # A resumed run brings the first run's starting point in its checkpoint.
            self._anchors[name] = self._anchors.get(name, weight.detach().clone()).to(weight.device)
            self._pulls.append((weight, self._anchors[name], self.alpha))
        self._speak(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for weight, anchor, strength in self._pulls:
            if id(weight) in mine and strength:
                l2_sp_gradient_([weight], [anchor], strength)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._pulls = []

    def state_dict(self) -> dict[str, Any]:
        return {"anchors": self._anchors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._anchors = dict(state_dict["anchors"])

    def _speak(self, trainer: Trainer) -> None:
        decays = {group.get("weight_decay", 0) for optimizer in trainer.optimizers for group in optimizer.param_groups}
        if decays - {0}:
            log.warning("L2SP pulls towards the starting point while the optimizer's weight_decay pulls towards zero: set it to 0")
        if not (self.alpha and self._anchors) and not self.beta:
            warnings.warn("L2SP pulls on nothing: alpha and beta are 0.", NoEffectWarning, stacklevel=3)
        log.info("L2SP anchors %d weights (alpha=%g), decays the rest (beta=%g)", len(self._anchors), self.alpha, self.beta)
