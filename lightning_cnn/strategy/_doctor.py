"""Says before training why a strategy cannot work as it was chosen, and what it will do that might surprise."""

import logging
import warnings
from typing import NamedTuple

from lightning.pytorch import LightningModule, Trainer
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_cnn.errors import NoEffectWarning, raise_all

log = logging.getLogger(__name__)


class Diagnosis(NamedTuple):
    """`problems` stop training; `advice` is worth knowing."""

    problems: list[str]
    advice: list[str]


def diagnose(trainer: Trainer, model: LightningModule) -> Diagnosis:
    """What is wrong with `trainer`'s strategy for this model: backend, BatchNorm, sampler and whatever the strategy itself knows."""
    found = Diagnosis([], [])
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    backend, device = getattr(strategy, "_process_group_backend", None), strategy.root_device.type
    if backend == "nccl" and device != "cuda":
        found.problems.append(
            f"process_group_backend='nccl' needs CUDA devices; this Trainer uses {device}. Use 'gloo' or leave it out"
        )
    if backend == "gloo" and device == "cuda":
        found.advice.append("process_group_backend='gloo' copies every gradient through host memory; 'nccl' does not")
    if device == "mps":
        found.problems.append(f"{name} needs torch.distributed, which has no backend for mps; use accelerator='cpu'")
    examine = getattr(strategy, "examine", None)
    own = examine(trainer, model) if examine else Diagnosis([], [])
    return Diagnosis(found.problems + own.problems, found.advice + own.advice)


def check(trainer: Trainer, model: LightningModule, workers: int | None = None) -> None:
    """Raise all problems at once, log the advice, and warn when there is nobody to work with (`workers`: if not the world's size)."""
    diagnosis = diagnose(trainer, model)
    raise_all(diagnosis.problems)
    for advice in diagnosis.advice:
        log.info("%s: %s", type(trainer.strategy).__name__, advice)
    if (workers or trainer.world_size) == 1:
        warnings.warn(
            f"{type(trainer.strategy).__name__} has one process, so it changes nothing; give Trainer(devices=...) more than one",
            NoEffectWarning,
            stacklevel=2,
        )


def batch_norms(model: LightningModule) -> list[str]:
    """Names of layers that normalise by the batch of one process."""
    return [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and not isinstance(m, SyncBatchNorm)]


def synced_norms(trainer: Trainer, model: LightningModule) -> list[str]:
    """Names of layers that need every rank at every forward pass."""
    asked = getattr(trainer.strategy, "_layer_sync", None) is not None
    return [name for name, m in model.named_modules() if isinstance(m, SyncBatchNorm)] or (batch_norms(model) if asked else [])
