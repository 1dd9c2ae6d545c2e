"""At the end of training, measure batch norm's statistics for the weights that are really there.

Averaged weights (EMA, soups) meet activations that no running average has seen; running averages also lag behind a fast last epoch.

Source: Izmailov et al. 2018, arXiv:1803.05407, section 3.2.
"""

import itertools
import logging
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_cnn.errors import NoEffectWarning, raise_all
from lightning_cnn.nn.batch_norm import reestimate_batch_norm
from lightning_cnn.nn.features import image_of

log = logging.getLogger(__name__)


class BatchNormReestimation(Callback):
    """Exact averages over `batches` training batches, with training's augmentation. Put it after EMA in the list of callbacks."""

    def __init__(self, *, batches: int = 100) -> None:
        raise_all([f"batches must be at least 1, got {batches}"] if batches < 1 else [])
        self.batches = batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        order = getattr(trainer, "callbacks", [self])
        later = [type(callback).__name__ for callback in order[order.index(self) :]]
        raise_all(
            ["BatchNormReestimation comes before EMA and would measure the wrong weights: put it after"] if "EMA" in later else []
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader: Any = trainer.train_dataloader
        moved = (trainer.strategy.batch_to_device(batch) for batch in itertools.islice(loader, self.batches))
        with trainer.precision_plugin.forward_context():
            layers = reestimate_batch_norm(
                pl_module,
                moved,
                lambda batch: pl_module(image_of(batch)),
                lambda total: trainer.strategy.reduce(total, reduce_op="mean"),
            )
        if not layers:
            warnings.warn("BatchNormReestimation: no layer keeps running statistics.", NoEffectWarning, stacklevel=2)
        log.info("re-estimated the statistics of %d layers on %d batches", layers, self.batches)
