"""CutMix: paste a rectangle of another picture, and share the label by area."""

import torch
from torch import Tensor

from lightning_cnn.callbacks._mixing import Mixing
from lightning_cnn.functional import mixing
from lightning_cnn.functional.keyed_random import KeyedRandom


class CutMix(Mixing):
    """Replace a rectangle of each training picture by that of another, and its label by the shares of the area.

    Args:
        classes: How many; the labels become probabilities (b classes), which `cross_entropy` takes as they are.
        alpha: Shape of the Beta distribution of the area that is kept; 1 is uniform.
        p: Part of the pictures that are mixed.
        seed: Another seed is other noise.
    """

    def __init__(self, *, classes: int, alpha: float = 1.0, p: float = 1.0, seed: int = 0) -> None:
        super().__init__(classes=classes, alpha=alpha, p=p, seed=seed)

    def mix(self, image: Tensor, partner: Tensor, share: Tensor, noise: KeyedRandom) -> tuple[Tensor, Tensor]:
        with noise:
            centre = torch.rand(len(image), 2)
        return mixing.cutmix(image, partner, share, centre)
