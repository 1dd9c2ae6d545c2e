"""Random pictures for training, made on the device of the batch: any Kornia pipeline, or a word from the menu.

Every sample's noise is a function of (seed, epoch, sample), so runs repeat themselves for any batch size, number of loader workers or
processes, and after a resume at any step. Validation, test and prediction are never touched.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from warnings import warn

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_cnn.callbacks._batch_hook import BatchTransform, Samples
from lightning_cnn.errors import NoEffectWarning, raise_all
from lightning_cnn.functional.batch import Batch, image_key, read, write
from lightning_cnn.functional.keyed_random import KeyedRandom
from lightning_cnn.nn.augment_menu import operations

log = logging.getLogger(__name__)

Augment = str | Callable[[Tensor], Tensor] | Sequence[Any]


class BatchAugmentation(BatchTransform):
    """Augment each training batch after its transfer to the device.

    Args:
        augment: A word of the menu (`lightning_cnn.nn.augment_menu.MENU`), a Kornia augmentation or container, any callable on
            (b c h w) floats that draws from torch's generator, or a list of these, applied in turn.
        seed: Another seed is other noise.
        data_keys: Which fields of a batch follow the image, and what they are to Kornia:
            `{"image": "input", "mask": "mask", "boxes": "bbox_xyxy"}`; positions for batches that are sequences.

    Images are uint8, or floats in [0, 1], and keep dtype and memory format: a model sees the same type in training and evaluation.
    """

    def __init__(self, *, augment: Augment, seed: int = 0, data_keys: Mapping[Any, str] | None = None) -> None:
        self.augment = operations(augment)
        self.seed = seed
        self.data_keys = dict(data_keys or {})
        self._pipeline = self._build()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not self.augment:
            warn(
                "BatchAugmentation has no operation and changes nothing. Give augment='flip' or leave it out.",
                NoEffectWarning,
                stacklevel=2,
            )
        log.info("Training batches pass %s (seed %d).", [_name(operation) for operation in self.augment], self.seed)

    def transform(self, batch: Any, samples: Samples) -> Any:
        keys = list(self.data_keys) or [image_key(batch)]
        values = [read(batch, key) for key in keys]
        return write(
            batch, dict(zip(keys, self.augmented(*values, key=samples.key(self.seed, "augment"), index=samples.index), strict=True))
        )

    def at_epoch(self, batch: Batch, epoch: int) -> Batch:
        """The batch as training would see it in `epoch`: for pictures of the noise, and for averaging over it."""
        return self.transform(batch, Samples(batch.index.cpu(), ("epoch", epoch)))

    def augmented(self, *values: Tensor, key: int, index: Tensor) -> list[Tensor]:
        """The fields of one batch with the noise of `key` (from `functional.counter.key`) for the samples of `index`."""
        if not self.augment:
            return list(values)
        results = self._pipeline(KeyedRandom(key, index), *(_to_unit(value) for value in values))
        results = results if isinstance(results, (list, tuple)) else [results]
        return [_like(result, value) for result, value in zip(results, values, strict=True)]

    def _build(self) -> Callable[..., Any]:
        if not self.data_keys:
            return _Chain(self.augment)
        from kornia.augmentation import AugmentationSequential

        steps: list[Any] = list(self.augment)
        raise_all(
            f"With data_keys every operation is a Kornia augmentation, which knows what to do with a mask; got {_name(step)}."
            for step in steps
            if not isinstance(step, nn.Module)
        )
        container = AugmentationSequential(*steps, data_keys=list(self.data_keys.values()))
        return lambda noise, *values: _within(noise, container, *values)


class _Chain:
    def __init__(self, steps: Sequence[Callable[..., Tensor]]) -> None:
        self.steps = steps

    def __call__(self, noise: KeyedRandom, image: Tensor) -> Tensor:
        for step in self.steps:
            if getattr(step, "draws_first", False):
                image = step(image, params=_within(noise, step.forward_parameters, image.shape))  # pyright: ignore
            else:
                image = _within(noise, step, image)
        return image


def _within(noise: KeyedRandom, function: Callable[..., Any], *args: Any) -> Any:
    with noise:
        return function(*args)


def _to_unit(value: Tensor) -> Tensor:
    return value.float() / 255 if value.dtype == torch.uint8 else value.float()


def _like(result: Tensor, given: Tensor) -> Tensor:
    if given.dtype == torch.uint8:
        result = (result * 255).round_().clamp_(0, 255)
    elif not given.is_floating_point():
        result = result.round()
    channels_last = given.ndim == 4 and not given.is_contiguous() and given.is_contiguous(memory_format=torch.channels_last)
    return result.to(given.dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _name(operation: Any) -> str:
    return type(operation).__name__ if isinstance(operation, nn.Module) else getattr(operation, "__name__", type(operation).__name__)
