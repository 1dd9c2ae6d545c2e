"""Random erasing: train on pictures of which a rectangle is missing."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cnn.callbacks._batch_hook import BatchTransform, Samples
from lightning_cnn.callbacks._data_keys import unknown_kinds
from lightning_cnn.errors import raise_all
from lightning_cnn.functional import erasing
from lightning_cnn.functional.batch import image_key, read, write
from lightning_cnn.functional.keyed_random import KeyedRandom

log = logging.getLogger(__name__)


class RandomErasing(BatchTransform):
    """Replace a rectangle of a training picture by noise, or by one value; validation, test and prediction are untouched.

    Args:
        p: Part of the pictures that lose a rectangle.
        area: Smallest and largest part of the picture that is lost.
        aspect: Smallest and largest height to width of the rectangle.
        fill: "noise", uniform for each pixel and channel, or a value in [0, 1], 0 is black; uint8 pictures get it times 255.
        seed: Another seed is other noise.
        data_keys: Fields of the batch, in Kornia's words: those that are a "mask" lose the rectangle too, to 0; boxes and keypoints stay.
    """

    def __init__(
        self,
        *,
        p: float = 0.5,
        area: tuple[float, float] = (0.02, 0.33),
        aspect: tuple[float, float] = (0.3, 3.3),
        fill: float | Literal["noise"] = "noise",
        seed: int = 0,
        data_keys: Mapping[Any, str] | None = None,
    ) -> None:
        self.data_keys = dict(data_keys or {})
        self.p, self.fill, self.seed = p, fill, seed
        self.area: tuple[float, float] = (area[0], area[1])  # a list, where it comes from a configuration
        self.aspect: tuple[float, float] = (aspect[0], aspect[1])
        raise_all(self._wrong_arguments())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            log.info("RandomErasing fills a rectangle of %g of the training pictures (seed %d).", self.p, self.seed)

    def transform(self, batch: Any, samples: Samples) -> Any:
        if self.p == 0:
            return batch
        where = image_key(batch)
        image = read(batch, where)
        noise = KeyedRandom(samples.key(self.seed, "erasing"), samples.index)
        boxes = erasing.erased_boxes(noise, len(image), tuple(image.shape[2:]), self.area, self.aspect, self.p)
        boxes = boxes.to(image.device)
        result = erasing.erase(image, boxes, self._fill(image, boxes, samples))
        layout = torch.channels_last if image.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        masks = {key: _erased_mask(read(batch, key), boxes) for key, kind in self.data_keys.items() if kind == "mask"}
        return write(batch, {where: result.contiguous(memory_format=layout), **masks})

    def _fill(self, image: Tensor, boxes: Tensor, samples: Samples) -> Tensor:
        if isinstance(self.fill, str):
            fill = erasing.noise_inside(
                samples.key(self.seed, "erasing fill"), samples.index.to(image.device), boxes, tuple(image.shape)
            )
        else:
            fill = torch.full((1,), float(self.fill), device=image.device)
        return (fill if image.is_floating_point() else (255 * fill).round()).to(image.dtype)

    def _wrong_arguments(self) -> list[str]:
        found = [] if 0 <= self.p <= 1 else [f"RandomErasing needs a probability between 0 and 1; got p={self.p}."]
        if not (len(self.area) == 2 and 0 < self.area[0] <= self.area[1] <= 1):
            found.append(f"area is the smallest and the largest part of the picture, 0 < smallest <= largest <= 1; got {self.area}.")
        if not (len(self.aspect) == 2 and 0 < self.aspect[0] <= self.aspect[1]):
            found.append(f"aspect is the smallest and the largest height to width, above 0; got {self.aspect}.")
        if self.fill != "noise" and not (isinstance(self.fill, (int, float)) and 0 <= self.fill <= 1):
            found.append(f"fill is 'noise' or a value between 0 and 1; got {self.fill!r}.")
        return [*found, *unknown_kinds(self.data_keys)]


def _erased_mask(mask: Tensor, boxes: Tensor) -> Tensor:
    maps = mask if mask.ndim == 4 else mask[:, None]
    result = erasing.erase(maps, boxes, mask.new_zeros(1))
    return result if mask.ndim == 4 else result[:, 0]
