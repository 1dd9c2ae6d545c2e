"""Progressive resizing: train on small pictures first, and on whole ones at the end."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_cnn.callbacks._batch_hook import BatchTransform, Samples
from lightning_cnn.callbacks._data_keys import IMAGE, unknown_kinds
from lightning_cnn.errors import raise_all
from lightning_cnn.functional.batch import image_key, read, write
from lightning_cnn.functional.resizing import resize, resize_annotation, size_at

log = logging.getLogger(__name__)


class ProgressiveResizing(BatchTransform):
    """Make training pictures smaller, growing from epoch to epoch; validation, test and prediction see whole pictures.

    Args:
        start: Edge length in the first epoch, as a part of the whole.
        full_from: Part of the epochs after which pictures are whole.
        multiple_px: Edge lengths are multiples of this; each new length is a new program for `torch.compile`.
        data_keys: Fields of the batch that follow the picture, in Kornia's words: `{"mask": "mask", "boxes": "bbox_xyxy"}`.

    The size is a function of the epoch and of `max_epochs`, so a resumed run goes on at the size it would have had.
    """

    def __init__(
        self, *, start: float = 0.5, full_from: float = 0.75, multiple_px: int = 4, data_keys: Mapping[Any, str] | None = None
    ) -> None:
        found = [] if 0 < start <= 1 else [f"start is a part of the edge, above 0 and up to 1; got {start}."]
        found += [] if 0 <= full_from <= 1 else [f"full_from is a part of the epochs, between 0 and 1; got {full_from}."]
        found += [] if multiple_px >= 1 else [f"multiple_px is a number of pixels, 1 or more; got {multiple_px}."]
        raise_all([*found, *unknown_kinds(data_keys or {})])
        self.data_keys = {key: kind for key, kind in (data_keys or {}).items() if kind not in IMAGE}
        self.start, self.full_from, self.multiple_px = start, full_from, multiple_px
        self._epochs = 1

    def problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        others: list[Any] = vars(trainer)["callbacks"]
        twins = [other for other in others if isinstance(other, ProgressiveResizing)]
        found = [f"{len(twins)} ProgressiveResizing would shrink one picture after the other. Keep one."] if len(twins) > 1 else []
        if (trainer.max_epochs or -1) < 1:
            found.append(
                f"ProgressiveResizing grows pictures over max_epochs; the Trainer has max_epochs={trainer.max_epochs}. Give a number."
            )
        return found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._epochs = trainer.max_epochs or 1
            log.info("Pictures grow from %g of their edge to the whole over %g of the epochs.", self.start, self.full_from)

    def transform(self, batch: Any, samples: Samples) -> Any:
        where = image_key(batch)
        image = read(batch, where)
        height, width = image.shape[2:]
        size = size_at(samples.epoch / self._epochs, (height, width), self.start, self.full_from, self.multiple_px)
        annotations = {
            key: resize_annotation(read(batch, key), kind, (height, width), size)
            for key, kind in self.data_keys.items()
            if size != (height, width)
        }
        return write(batch, {where: resize(image, size), **annotations})
