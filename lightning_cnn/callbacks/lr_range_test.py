"""Before training, raise the learning rate from tiny to huge over a few batches, take the rate where the loss falls fastest, and draw it.

Lightning's own finder does the run and puts the weights back; this adds the picture, a line that says what was chosen, and a refusal where
the finder would set something nobody reads.

Source: Smith 2017, "Cyclical learning rates", arXiv:1506.01186, section 3.3.
"""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder

from lightning_cnn import plot
from lightning_cnn.errors import raise_all

log = logging.getLogger(__name__)


class LRRangeTest(Callback):
    """`steps` batches from `lowest` to `highest`; sets the module's `attribute` and writes `lr_range.png` to the Trainer's folder."""

    def __init__(self, *, lowest: float = 1e-7, highest: float = 1.0, steps: int = 100, attribute: str = "lr") -> None:
        problems = [f"give 0 < lowest < highest, got {lowest} and {highest}"] if not 0 < lowest < highest else []
        problems += [f"steps must be at least 20 for a slope to be seen, got {steps}"] if steps < 20 else []
        raise_all(problems)
        self.lowest, self.highest, self.steps, self.attribute = lowest, highest, steps, attribute
        self.suggestion: float | None = None
        self._rate: float | None = None
        self._resumed: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not hasattr(pl_module, self.attribute):
            raise_all([f"{type(pl_module).__name__} has no attribute {self.attribute!r} that configure_optimizers reads the rate from"])

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self._rate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict["rate"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed is None:
            self._look(trainer, pl_module)
        else:  # the checkpoint brings the optimizer's and the scheduler's rates
            setattr(pl_module, self.attribute, self._resumed)
            log.info("resumed with the learning rate %g of the first part", self._resumed)
        self._rate, self._resumed = getattr(pl_module, self.attribute), None

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finder = LearningRateFinder(self.lowest, self.highest, self.steps, early_stop_threshold=None, attr_name=self.attribute)
        before = getattr(pl_module, self.attribute)
        # The finder counts in steps; without this it stops where the real run would.
        epochs, trainer.fit_loop.max_epochs = trainer.fit_loop.max_epochs, -1
        try:
            finder.on_fit_start(trainer, pl_module)
        finally:
            trainer.fit_loop.max_epochs = epochs
        found = finder.optimal_lr
        self.suggestion = found.suggestion() if found is not None else None
        if found is None or self.suggestion is None:
            setattr(pl_module, self.attribute, before)
            log.warning("the range test saw no falling loss; the learning rate stays %g", before)
            return
        folder = Path(trainer.default_root_dir)
        plot.lr_range(found.results["lr"], found.results["loss"], suggestion=self.suggestion).savefig(folder / "lr_range.png")
        log.info("learning rate %g instead of %g: the loss falls fastest there (lr_range.png)", self.suggestion, before)
