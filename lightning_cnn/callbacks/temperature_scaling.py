"""One number, fitted on validation data, that makes a network as sure as it is right.

Source: Guo et al. 2017, "On calibration of modern neural networks", section 4.2, arXiv:1706.04599.
"""

import logging
from collections.abc import Callable
from typing import Any
from warnings import warn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_cnn.callbacks._forward import unwrap, wrap
from lightning_cnn.callbacks._members import logits_of
from lightning_cnn.callbacks._views import Place, place_of
from lightning_cnn.errors import NoEffectWarning
from lightning_cnn.functional.batch import label_key, read
from lightning_cnn.functional.calibration import fit_temperature

log = logging.getLogger(__name__)


class TemperatureScaling(Callback):
    """Fit `temperature` on the logits and labels of each validation; divide the logits by it in test and prediction.

    Saved in checkpoints and restored by `ckpt_path=`. Labels are integers. Listed after `Marginalize`, it calibrates the marginalised
    prediction; listed before it, each member. Accuracy never changes when it is listed last.

    Args:
        module: Name of the submodule whose forward gives logits; by default the LightningModule itself.
    """

    def __init__(self, *, module: str | None = None) -> None:
        self.module = module
        self.temperature: float | None = None
        self._place: Place | None = None
        self._last: Tensor | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        place_of(pl_module, self.module, trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.temperature = state_dict["temperature"]

    def _start(self, trainer: Trainer, pl_module: LightningModule, around: Callable[..., Tensor]) -> None:
        self._seen, self._place = [], place_of(pl_module, self.module, trainer)
        wrap(self._place.target, self, around)

    def _watched(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if self._place is not None:
            self._last = logits_of(output, self._place.target).detach()
        return output

    def _scaled(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return output if self.temperature is None else logits_of(output, self._place.target) / self.temperature  # type: ignore[union-attr]

    def _remove(self) -> None:
        if self._place is not None:
            unwrap(self._place.target, self)
        self._place, self._last, self._seen = None, None, []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module, self._watched)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if self._last is not None:
            self._seen.append((self._last, read(batch, label_key(batch)).detach()))
            self._last = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._seen and not trainer.sanity_checking:
            logits, label = (torch.cat(part) for part in zip(*self._seen, strict=True))
            self.temperature = fit_temperature(logits, label, total=lambda slope: trainer.strategy.reduce(slope, reduce_op="sum"))
            log.info("Temperature %.4f from %d pictures of this process.", self.temperature, len(label))
        self._remove()

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.temperature is None:
            message = "TemperatureScaling has no temperature yet and changes nothing. Validate first, or give ckpt_path=."
            warn(message, NoEffectWarning, stacklevel=2)
        self._start(trainer, pl_module, self._scaled)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._apply(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._apply(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()
