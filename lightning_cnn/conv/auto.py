"""Give every convolution of a model the fastest algorithm that is accurate enough, measured where it runs.

Source: Frigo & Johnson 2005, "The design and implementation of FFTW3" (planning by measurement); `cudnn.benchmark`, which measures
too, but knows neither memory layouts nor an error budget and forgets at exit.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_cnn.conv import _confirm, _swap
from lightning_cnn.conv._report import Report, report

MEASURING = 2  # batches: one in which the layers are measured, one in which they look the choices up
log = logging.getLogger(__name__)


class ConvAlgorithm(Callback):
    """Swap the model's convolutions before a run and put them back after it, also when the run ends in an error.

    `algorithm`, `max_error`, `max_workspace_mb` and `cache` are those of `lightning_cnn.conv.swap`. With several processes, what the
    first step met is measured on rank 0 between that step and the next and broadcast. Then every other one of twice `trial_batches`
    batches runs by the default: choices with which the whole step is slower are taken back (0: no trial; fewer than 5 show nothing). At
    the end of each of the first `recheck_epochs` epochs the choices are measured again, and reverted where they are slower than the
    default. `report` has the table after a run, and the run's folder its picture.
    """

    def __init__(
        self,
        *,
        algorithm: str | Mapping[str, str] = "auto",
        max_error: float = 1e-5,
        max_workspace_mb: float = 256.0,
        cache: str | None = "default",
        trial_batches: int = 16,
        recheck_epochs: int = 1,
    ) -> None:
        self.algorithm = algorithm if isinstance(algorithm, str) else dict(algorithm)
        self.options = {"max_error": max_error, "max_workspace_mb": max_workspace_mb, "cache": cache}
        self.trial_batches, self.recheck_epochs = trial_batches, recheck_epochs
        self._trial: _confirm.Trial | None = None
        self._batches, self._started = 0, 0.0
        self._folder: str | None = None
        self.report: Report | None = None
        _swap.check(self.algorithm, **self.options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Asked here, where every process is: `log_dir` is a collective, and an exception may come to one alone
        self._folder = trainer.log_dir if trainer.logger else None
        if any(type(layer) is nn.Conv2d for layer in pl_module.modules()):  # Others are built later, in configure_model
            self._swap(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._end(trainer, pl_module)
        self._settle(pl_module, batch_idx)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if _alone(trainer):
            self._begin(pl_module)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if _alone(trainer):
            self._end(trainer, pl_module)
        self._settle(pl_module, batch_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for tuner in _swap.tuners(pl_module):
            tuner.tune_pending()
            if trainer.current_epoch < self.recheck_epochs:
                tuner.recheck()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish(trainer, pl_module)

    def _swap(self, pl_module: LightningModule) -> None:
        if not _swap.swapped(pl_module):
            _swap.swap(pl_module, self.algorithm, **self.options)
            self._batches = 0
            self._trial = _confirm.Trial(self.trial_batches) if self.trial_batches and _swap.tuners(pl_module) else None

    def _begin(self, pl_module: LightningModule) -> None:
        if self._trial is not None and self._batches >= MEASURING:
            _confirm.pause(pl_module, self._batches % 2 == 1)
            self._started = _seconds(pl_module)

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The whole step is timed, with the choices and without; on rank 0 for all."""
        if self._trial is None:
            return
        if self._batches >= MEASURING:
            self._trial.add(_seconds(pl_module) - self._started, stock=self._batches % 2 == 1)
            _confirm.pause(pl_module, False)
        self._batches += 1
        if self._trial.done:
            speedup, slower = trainer.strategy.broadcast((self._trial.speedup, self._trial.slower))
            self._trial = None
            if slower:
                _confirm.take_back(pl_module, speedup)

    def _settle(self, pl_module: LightningModule, batch_idx: int) -> None:
        if batch_idx == 0:  # The one batch that every rank has
            for tuner in _swap.tuners(pl_module):
                tuner.tune_pending()

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _swap.swapped(pl_module):
            return
        _confirm.pause(pl_module, False)
        self.report = report(pl_module)
        _swap.restore(pl_module)
        if self._folder and trainer.is_global_zero:
            write(self.report, Path(self._folder))
        chosen = Counter(row.algorithm for row in self.report.rows)
        log.info(
            "Convolution passes by algorithm: %s.", ", ".join(f"{name} {many}" for name, many in chosen.most_common()) or "none seen"
        )


def write(found: Report, folder: Path) -> None:
    """`convolutions.txt`, the table, and `convolutions.png`, the time of each pass where it was measured."""
    from lightning_cnn.plot import conv_report

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "convolutions.txt").write_text(f"{found}\n")
    if any(row.seconds for row in found.rows):
        conv_report(found.rows).savefig(folder / "convolutions.png")


def _alone(trainer: Trainer) -> bool:
    """Evaluation by one process on its own: others may have different numbers of batches, and validation in a fit is not the fit."""
    return trainer.world_size == 1 and trainer.state.fn != TrainerFn.FITTING


def _seconds(pl_module: LightningModule) -> float:
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
