"""Keep frozen batch norm frozen: stored statistics normalise, and do not move.

`BackboneFinetuning(train_bn=False)` leaves the layers in training mode: the running mean still moves, or (with tracking switched off)
each batch is normalised by itself, so the "frozen" features depend on which pictures share a batch.

Source: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.1 (what is fixed at inference).
"""

import logging
import re
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_cnn.errors import ConfigurationError, NoEffectWarning
from lightning_cnn.nn.freezing import Freezer, norm_layers

log = logging.getLogger(__name__)


class FrozenBatchNorm(Callback):
    """Layers in evaluation mode while training.

    `layers`: "frozen" (those whose own weights ask for no gradient; followed step by step, so a layer that is unfrozen later trains
    from then on), "all" (statistics of the pretraining set are kept everywhere, weights go on learning: for small batches), or a
    regular expression on module names.
    """

    def __init__(self, *, layers: str = "frozen") -> None:
        self.layers = layers
        self._freezer = Freezer()
        self._norms: list[tuple[str, nn.Module]] = []
        self._held: list[nn.Module] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._norms, self._held = list(norm_layers(pl_module)), []
        if self.layers not in ("frozen", "all"):
            every, self._norms = self._norms, [(n, m) for n, m in self._norms if re.search(self.layers, n)]
            if not self._norms:
                names = ", ".join(name for name, _ in every[:6]) or "none"
                raise ConfigurationError(f"layers={self.layers!r} matches no layer with running statistics; there are: {names}.")
        held = self._follow(pl_module)
        if not held:
            warnings.warn(
                f"FrozenBatchNorm(layers={self.layers!r}) holds no layer: none has running statistics and frozen weights. "
                "Freeze a part first (GradualUnfreezing) or use layers='all'.",
                NoEffectWarning,
                stacklevel=2,
            )
        log.info("FrozenBatchNorm holds %d of %d layers with running statistics", held, len(list(norm_layers(pl_module))))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._follow(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._freezer.undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._freezer.undo()

    def _follow(self, pl_module: LightningModule) -> int:
        held = [module for name, module in self._norms if self.layers != "frozen" or _is_frozen(pl_module, name, module)]
        if held == self._held:
            self._freezer.hold()
            return len(held)
        self._freezer.thaw([module for module in self._held if module not in held], [])
        self._freezer.still(held)
        self._held = held
        return len(held)


def _is_frozen(root: nn.Module, name: str, layer: nn.Module) -> bool:
    """Its own weights decide; a layer without weights goes with the parameters beside it."""
    weights = list(layer.parameters()) or list(root.get_submodule(name.rpartition(".")[0]).parameters())
    return bool(weights) and not any(weight.requires_grad for weight in weights)
