"""The next batch is on the GPU before the step that needs it begins: any loader, any type of batch, training and evaluation.

Source: CS231n 2016, lecture 11, "CPU - GPU communication"; NVIDIA Apex's `data_prefetcher`, whose shape this has.
"""

import logging
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_cnn.callbacks._prefetch import Prefetched, SideStream
from lightning_cnn.errors import ConfigurationError, NoEffectWarning, raise_all

log = logging.getLogger(__name__)
HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device")


class DevicePrefetch(Callback):
    """Copy `depth` batches ahead, on a stream of its own, from a ring of pinned buffers.

    The order of the batches and a stateful loader's position stay exact: its state is that of the last batch delivered. What comes
    after the transfer (`on_after_batch_transfer`, augmentation, conversion to the run's precision) happens as before.

    Raises:
        ConfigurationError: at `setup`: the module or DataModule has its own `on_before_batch_transfer` or `transfer_batch_to_device`,
            which would find its batch on the device already.
    """

    def __init__(self, *, depth: int = 1) -> None:
        raise_all([f"depth must be at least 1, got {depth}"] if depth < 1 else [], ConfigurationError)
        self.depth = depth
        self._trainer: Trainer | None = None
        self._before: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()
        device = trainer.strategy.root_device
        if device.type != "cuda":
            message = f"DevicePrefetch changes nothing on {device.type}: there is no copy to hide. Leave it out."
            warnings.warn(message, NoEffectWarning, stacklevel=2)
            return
        raise_all(_problems(trainer, pl_module))
        self._attach(trainer, SideStream(device, self.depth))
        log.info("The next %d batch(es) are copied to %s while a step runs.", self.depth, device)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def _attach(self, trainer: Trainer, lane: Any) -> None:
        """Lightning hands every loader to the strategy's `process_dataloader` before its first use."""
        original = trainer.strategy.process_dataloader
        self._trainer, self._before = trainer, vars(trainer.strategy).get("process_dataloader")
        vars(trainer.strategy)["process_dataloader"] = lambda loader: Prefetched(original(loader), lane, self.depth)

    def _remove(self) -> None:
        if self._trainer is not None:
            vars(self._trainer.strategy).pop("process_dataloader", None)
            if self._before is not None:
                vars(self._trainer.strategy)["process_dataloader"] = self._before
        self._trainer = None


def _problems(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    owners = [owner for owner in (pl_module, getattr(trainer, "datamodule", None)) if owner is not None]
    return [
        f"{type(owner).__name__}.{hook} works on a batch that has not been copied yet, but DevicePrefetch copies it ahead. "
        "Do it in on_after_batch_transfer, or leave DevicePrefetch out."
        for owner in owners
        for hook in HOOKS
        if is_overridden(hook, owner)
    ]
