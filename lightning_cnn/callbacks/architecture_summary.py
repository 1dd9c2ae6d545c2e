"""A table of what each layer makes, costs and sees, taken from the first training batch."""

import logging
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_cnn.functional.batch import image_key, read
from lightning_cnn.functional.roofline import roofline
from lightning_cnn.nn.architecture import Architecture, architecture

log = logging.getLogger(__name__)


class ArchitectureSummary(Callback):
    """Run the model once more on one picture of the first training batch, and write `architecture.txt` and `architecture.png`.

    The run is in evaluation mode, without gradients or random numbers: training is the same to the last bit.

    Args:
        folder: Where the files go; by default the logger's folder. Without either, only the attribute is filled.

    Attributes:
        found: The `lightning_cnn.nn.Architecture`, after the first batch of a fit.
    """

    def __init__(self, *, folder: str | None = None) -> None:
        self.folder = folder
        self.found: Architecture | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        if self.found is not None:
            return
        image = read(batch, image_key(batch))[:1]
        with trainer.precision_plugin.forward_context():  # on every process: sharded weights are gathered by all
            self.found = architecture(pl_module, image, best=roofline(image.device))
        total = self.found
        log.info("%.1f million multiply-adds, %.2f million parameters.", total.multiply_adds / 1e6, total.parameters / 1e6)
        folder = self.folder or (trainer.log_dir if trainer.logger else None)
        if folder and trainer.is_global_zero:
            write(total, Path(folder), picture_px=image.shape[-2])


def write(found: Architecture, folder: Path, *, picture_px: int) -> None:
    """`architecture.txt` and `architecture.png` in `folder`."""
    from lightning_cnn.plot import architecture_chart

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "architecture.txt").write_text(f"{found}\n")
    architecture_chart(found.rows, picture_px=picture_px).savefig(folder / "architecture.png")
