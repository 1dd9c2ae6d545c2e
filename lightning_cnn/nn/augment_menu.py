"""Augmentations by name: `operations("cifar")`, or the same word as `augment=cifar` on the command line."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from kornia.augmentation import RandomErasing

from lightning_cnn.errors import raise_all
from lightning_cnn.nn.fused_augmentation import FusedAugmentation
from lightning_cnn.nn.trivial_augment import TrivialAugment

JITTER: dict[str, Any] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
AFFINE: dict[str, Any] = {"rotate_deg": 15.0, "translate": 0.1, "scale": (0.9, 1.1), "shear_deg": 10.0, "stretch": 0.1}
MENU: dict[str, Callable[[], list[Any]]] = {
    "flip": lambda: [FusedAugmentation(flip=0.5)],
    "crop": lambda: [FusedAugmentation(crop=(0.25, 1.0))],
    "scale": lambda: [FusedAugmentation(scale=(0.75, 1.33))],
    "jitter": lambda: [FusedAugmentation(**JITTER)],
    "lighting": lambda: [FusedAugmentation(lighting=0.1)],
    "affine": lambda: [FusedAugmentation(**AFFINE)],
    "lens": lambda: [FusedAugmentation(lens=0.1, lens_tangential=0.02)],
    "imagenet": lambda: [
        FusedAugmentation(flip=0.5, crop=(0.08, 1.0), **JITTER, lighting=0.1)
    ],  # AlexNet to ResNet: arXiv:1512.03385, 3.4
    "cifar": lambda: [FusedAugmentation(flip=0.5, pad_crop_px=4)],  # Lee et al. 2015, arXiv:1409.5185
    "heavy": lambda: [FusedAugmentation(flip=0.5, **AFFINE, **JITTER, lens=0.1, lighting=0.1), RandomErasing(p=0.25)],
    "trivial": lambda: [FusedAugmentation(flip=0.5), TrivialAugment()],  # Mueller & Hutter 2021, arXiv:2103.10158
}


def operations(augment: Any) -> list[Callable[..., Any]]:
    """The list of operations meant by a word, an operation, or a list of both."""
    items = list(augment) if isinstance(augment, Sequence) and not isinstance(augment, str) else [augment]
    raise_all(problem for item in items for problem in _problems(item))
    return [operation for item in items for operation in (MENU[item]() if isinstance(item, str) else [item])]


def _problems(item: Any) -> list[str]:
    if isinstance(item, str) and item not in MENU:
        close = get_close_matches(item, MENU, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        return [f"There is no augmentation {item!r}. {hint}The menu: {', '.join(MENU)}."]
    if not isinstance(item, str) and not callable(item):
        return [f"An augmentation is a word of the menu or callable on images; got {item!r} of type {type(item).__name__}."]
    return []
