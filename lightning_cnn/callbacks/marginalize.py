"""Training adds noise, testing averages it out: predictions are the mean over views of the picture, the network and its weights.

Source: CS231n 2016, lecture 11, "Convolutional neural networks in practice".
"""

import logging
from collections.abc import Sequence
from typing import Any, get_args
from warnings import warn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_cnn.callbacks._forward import unwrap, wrap
from lightning_cnn.callbacks._members import Members
from lightning_cnn.callbacks._network_views import Expand, MCDropConnect, MCDropout
from lightning_cnn.callbacks._views import Augmented, FiveCrop, HorizontalFlip, MultiScale, TenCrop, View, place_of, read_views
from lightning_cnn.callbacks._weight_views import Ensemble, MCBatchNorm
from lightning_cnn.errors import ConfigurationError, NoEffectWarning, raise_all
from lightning_cnn.functional.batch import Batch
from lightning_cnn.functional.marginalize import entropy, expected_entropy, log_mean_prob, mutual_information

log = logging.getLogger(__name__)

WORDS: dict[str, type[View]] = {
    "flip": HorizontalFlip, "five_crop": FiveCrop, "ten_crop": TenCrop, "multi_scale": MultiScale, "augmented": Augmented,
    "mc_dropout": MCDropout, "mc_dropconnect": MCDropConnect, "mc_batch_norm": MCBatchNorm, "ensemble": Ensemble,
}  # fmt: skip


class Marginalize(Callback):
    """Average over test-time noise in validation, test and prediction.

    The forward of the module returns the log of the members' mean probability: a valid logit, so losses, argmax and metrics work
    as they are. Several views multiply: `[MultiScale(224, 256), TenCrop(224)]` is 20 members.

    Args:
        views: Views, or words of the menu: `["flip", {"ten_crop": 24}]`.
        module: Name of the submodule whose forward takes pictures and gives logits; by default the LightningModule itself.
        seed: Another seed draws other masks. They depend on (seed, sample, member, element), not on the batch, rank or device.
        expand: Where the batch is repeated for noise inside the network: `late` (at the first random layer if no skip spans it, else
            at the input), `input`, or `loop` (one member after the other: least memory). The members are the same.

    Attributes:
        last: Entropy, expected entropy and mutual information (nats, one a picture) of the last forward.
        uncertainty: The same for all pictures of the last validation, test or prediction on this rank, in their order.
    """

    def __init__(self, *, views: Sequence[Any] = (), module: str | None = None, seed: int = 0, expand: Expand = "late") -> None:
        self.views = read_views(views, WORDS)
        self.module, self.seed = module, seed
        self.expand: Expand = expand
        if expand not in get_args(Expand):
            raise ConfigurationError(f"expand={expand!r} is not known; choose late, input or loop.")
        self.last: dict[str, Tensor] | None = None
        self.uncertainty: dict[str, Tensor] = {}
        self._parts: list[dict[str, Tensor]] = []
        self._members: Members | None = None
        self._index: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.views:
            warn("Marginalize has no views and changes nothing. Give views=[HorizontalFlip()] or leave it out.", NoEffectWarning, 2)
            return
        members = self._made(trainer, pl_module)
        raise_all(members.problems())
        log.info("Predictions are the mean of %d members: %s.", len(members), self.views)

    def _made(self, trainer: Trainer, pl_module: LightningModule) -> Members:
        return Members(place_of(pl_module, self.module, trainer), self.views, self.seed, self.expand)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._parts, self.uncertainty, self.last = [], {}, None
        if not self.views:
            return
        self._members = members = self._made(trainer, pl_module)
        members.attach()
        wrap(members.place.target, self, lambda forward, *a, **k: members.around(forward, self._result, lambda: self._index)(*a, **k))

    def _result(self, log_probs: Tensor) -> Tensor:
        mean = log_mean_prob(log_probs)
        self.last = {
            "entropy": entropy(mean),
            "expected_entropy": expected_entropy(log_probs),
            "mutual_information": mutual_information(log_probs),
        }
        return mean

    def _batch_start(self, batch: Any) -> None:
        self._index = batch.index if isinstance(batch, Batch) else None
        self.last = None

    def _batch_end(self, outputs: Any, pl_module: LightningModule, stage: str) -> None:
        if self.last is None:
            return
        self._parts.append({name: value.cpu() for name, value in self.last.items()})
        if stage != "predict":
            means = {f"{stage}_{name}": value.mean() for name, value in self.last.items()}
            pl_module.log_dict(means, on_step=False, on_epoch=True, batch_size=len(self.last["entropy"]), sync_dist=True)
        elif isinstance(outputs, dict):
            outputs.update(self.last)

    def _end(self) -> None:
        if self._members is not None and not self._parts:
            warn("Marginalize changed nothing: the module it wraps was never called. Check module=.", NoEffectWarning, 2)
        self.uncertainty = {name: torch.cat([part[name] for part in self._parts]) for name in (self._parts[0] if self._parts else {})}
        self._remove()

    def _remove(self) -> None:
        if self._members is not None:
            unwrap(self._members.place.target, self)
        self._members = self._index = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self._batch_start(batch)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._batch_end(outputs, pl_module, "val")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self._batch_start(batch)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._batch_end(outputs, pl_module, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self._batch_start(batch)

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._batch_end(outputs, pl_module, "predict")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()
