"""The one place where callbacks change training batches: after they have reached their device, before anything else sees them.

`trainer.strategy.batch_to_device` is wrapped because it is the one step every training batch passes, whatever its type and whoever
overrides the transfer hooks; changing the batch in `on_train_batch_start` fails for tuples, and wrapping the module's
`on_after_batch_transfer` is silently off when a DataModule has its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_cnn.errors import raise_all
from lightning_cnn.functional import counter
from lightning_cnn.functional.batch import Batch, image_key, read


@dataclass(frozen=True)
class Samples:
    """Which samples a batch holds, on the CPU, and when: all that noise may depend on besides the seed."""

    index: Tensor
    moment: tuple[int | str, ...]

    @property
    def epoch(self) -> int:
        return int(self.moment[1])

    def key(self, seed: int, stream: str) -> int:
        return counter.key(seed, stream, *self.moment)


class BatchTransform(Callback):
    """A callback that changes training batches in `transform`. Several stack in the order of the Trainer's list."""

    seed: int = 0
    _hook: "_BatchToDevice | None" = None

    def transform(self, batch: Any, samples: Samples) -> Any:
        """A new batch; keep the given one and the types of its fields as they are."""
        raise NotImplementedError

    def problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """What keeps this callback from working here."""
        others: list[Callback] = vars(trainer)["callbacks"]
        twins = [other for other in others if isinstance(other, type(self)) and other.seed == self.seed]
        if len(twins) > 1 and twins[0] is self:
            return [f"{len(twins)} {type(self).__name__} have the seed {self.seed} and would draw the same noise. Give each its own."]
        return []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        found = self.problems(trainer, pl_module)
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            found.append(
                f"{type(self).__name__} changes batches on their way to the device, but training_step(dataloader_iter) "
                "fetches its own. Take `batch` instead."
            )
        raise_all(found)
        self._hook = _attach(trainer, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._hook is not None:
            self._hook.remove(self)
            self._hook = None


class _BatchToDevice:
    """Stands in for `strategy.batch_to_device` as long as one transform needs it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.before: Callable[..., Any] | None = trainer.strategy.__dict__.get("batch_to_device")
        self.original: Callable[..., Any] = trainer.strategy.batch_to_device
        self.transforms: list[BatchTransform] = []

    def __call__(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if batch is None or not self.trainer.training or not self.transforms:
            return self.original(batch, device=device, dataloader_idx=dataloader_idx)
        samples = _samples(self.trainer, batch)  # before the transfer, so that the index is read without waiting for the device
        batch = self.original(batch, device=device, dataloader_idx=dataloader_idx)
        with torch.no_grad():
            for transform in self.transforms:
                batch = transform.transform(batch, samples)
        return self.trainer.precision_plugin.convert_input(batch)

    def remove(self, transform: BatchTransform) -> None:
        self.transforms = [other for other in self.transforms if other is not transform]
        installed = vars(self.trainer.strategy)
        # Somebody may have wrapped us in turn: then we stay in his chain, without effect.
        if not self.transforms and installed.get("batch_to_device") is self:
            del installed["batch_to_device"]
            if self.before is not None:
                installed["batch_to_device"] = self.before


def _attach(trainer: Trainer, transform: BatchTransform) -> _BatchToDevice:
    hook = trainer.strategy.__dict__.get("batch_to_device")
    if not isinstance(hook, _BatchToDevice):
        hook = _BatchToDevice(trainer)
        trainer.strategy.batch_to_device = hook
    if not any(other is transform for other in hook.transforms):
        hook.transforms.append(transform)
    return hook


def _samples(trainer: Trainer, batch: Any) -> Samples:
    if isinstance(batch, Batch):
        return Samples(batch.index.cpu(), ("epoch", trainer.current_epoch))
    # The batch's number within the epoch, not global_step: that stands still while gradients accumulate.
    number = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    size = len(read(batch, image_key(batch)))
    position = trainer.global_rank * size + torch.arange(size)
    return Samples(position, ("epoch", trainer.current_epoch, "batch", number))
