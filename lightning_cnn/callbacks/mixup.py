"""MixUp: train on weighted means of two pictures and of their labels."""

from torch import Tensor

from lightning_cnn.callbacks._mixing import Mixing
from lightning_cnn.functional import mixing
from lightning_cnn.functional.keyed_random import KeyedRandom


class MixUp(Mixing):
    """Replace each training picture by `share * own + (1 - share) * another's`, its label alike; share ~ Beta(alpha, alpha).

    Args:
        classes: How many; the labels become probabilities (b classes), which `cross_entropy` takes as they are.
        alpha: Shape of the Beta distribution: 0.2 to 0.4 keeps most pictures nearly pure (ImageNet), 1 is uniform (CIFAR).
        p: Part of the pictures that are mixed.
        seed: Another seed is other noise.
    """

    def __init__(self, *, classes: int, alpha: float = 0.2, p: float = 1.0, seed: int = 0) -> None:
        super().__init__(classes=classes, alpha=alpha, p=p, seed=seed)

    def mix(self, image: Tensor, partner: Tensor, share: Tensor, noise: KeyedRandom) -> tuple[Tensor, Tensor]:
        return mixing.mixup(image, partner, share), share
