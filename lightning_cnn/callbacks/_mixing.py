"""What MixUp and CutMix have in common: pairs of pictures, and labels that become probabilities."""

import logging
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cnn.callbacks._batch_hook import BatchTransform, Samples
from lightning_cnn.errors import raise_all
from lightning_cnn.functional import mixing
from lightning_cnn.functional.batch import image_key, label_key, read, write
from lightning_cnn.functional.keyed_random import KeyedRandom

log = logging.getLogger(__name__)


class Mixing(BatchTransform):
    """Mixes each training picture with another of its batch; the label becomes the probabilities (b k) of the mixture."""

    def __init__(self, *, classes: int, alpha: float, p: float, seed: int) -> None:
        name = type(self).__name__
        found = [] if classes >= 2 else [f"{name} makes probabilities of at least 2 classes; got classes={classes}."]
        found += [] if alpha > 0 else [f"{name} needs alpha > 0, the shape of the Beta distribution; got alpha={alpha}."]
        found += [] if 0 <= p <= 1 else [f"{name} needs a probability between 0 and 1; got p={p}."]
        raise_all(found)
        self.classes, self.alpha, self.p, self.seed = classes, alpha, p, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            log.info("%s mixes training pictures (alpha %g, p %g, seed %d).", type(self).__name__, self.alpha, self.p, self.seed)

    def transform(self, batch: Any, samples: Samples) -> Any:
        if self.p == 0:
            return batch
        where, what = image_key(batch), label_key(batch)
        image, label = read(batch, where), read(batch, what)
        noise = KeyedRandom(samples.key(self.seed, type(self).__name__), samples.index)
        partner = mixing.partners(noise, samples.index).to(image.device)
        share = mixing.mix_weights(noise, len(image), self.alpha, self.p)
        mixed, share = self.mix(image.float(), partner, share, noise)
        mixed = mixed if image.is_floating_point() else mixed.round()
        layout = torch.channels_last if image.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        soft = mixing.mix_labels(label, partner, share.to(image.device), self.classes)
        return write(batch, {where: mixed.to(image.dtype).contiguous(memory_format=layout), what: soft})

    def mix(self, image: Tensor, partner: Tensor, share: Tensor, noise: KeyedRandom) -> tuple[Tensor, Tensor]:
        """The mixed pictures, and the share of itself that each has kept."""
        raise NotImplementedError
