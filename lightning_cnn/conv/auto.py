"""Give every convolution of a model the fastest algorithm that is accurate enough, measured where it runs.

Source: Frigo & Johnson 2005, "The design and implementation of FFTW3" (planning by measurement); `cudnn.benchmark`, which measures
too, but knows neither memory layouts nor an error budget and forgets at exit.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_cnn.conv import _swap

log = logging.getLogger(__name__)


class ConvAlgorithm(Callback):
    """Swap the model's convolutions before a run and put them back after it, also when the run ends in an error.

    `algorithm`, `max_error`, `max_workspace_mb` and `cache` are those of `lightning_cnn.conv.swap`. With several processes, what the
    first step met is measured on rank 0 between that step and the next and broadcast. At the end of each of the first
    `recheck_epochs` epochs the choices are measured again, and reverted where they are slower than the default. `report` has the
    table after a run.
    """

    def __init__(
        self,
        *,
        algorithm: str | Mapping[str, str] = "auto",
        max_error: float = 1e-5,
        max_workspace_mb: float = 256.0,
        cache: str | None = "default",
        recheck_epochs: int = 1,
    ) -> None:
        self.algorithm = algorithm if isinstance(algorithm, str) else dict(algorithm)
        self.options = {"max_error": max_error, "max_workspace_mb": max_workspace_mb, "cache": cache}
        self.recheck_epochs = recheck_epochs
        self.report: Any = None
        _swap.check(self.algorithm, **self.options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if any(type(layer) is nn.Conv2d for layer in pl_module.modules()):  # Others are built later, in configure_model
            self._swap(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._settle(pl_module, batch_idx)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._settle(pl_module, batch_idx)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for tuner in _swap.tuners(pl_module):
            tuner.tune_pending()
            if trainer.current_epoch < self.recheck_epochs:
                tuner.recheck()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._finish(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish(pl_module)

    def _swap(self, pl_module: LightningModule) -> None:
        if not _swap.swapped(pl_module):
            _swap.swap(pl_module, self.algorithm, **self.options)

    def _settle(self, pl_module: LightningModule, batch_idx: int) -> None:
        if batch_idx == 0:  # The one batch that every rank has
            for tuner in _swap.tuners(pl_module):
                tuner.tune_pending()

    def _finish(self, pl_module: LightningModule) -> None:
        from lightning_cnn.conv._report import report

        if not _swap.swapped(pl_module):
            return
        self.report = report(pl_module)
        _swap.restore(pl_module)
        chosen = Counter(row.algorithm for row in self.report.rows)
        log.info(
            "Convolution passes by algorithm: %s.", ", ".join(f"{name} {many}" for name, many in chosen.most_common()) or "none seen"
        )
