"""Augmentations by name: `operations("cifar")`, or the same word as `augment=cifar` on the command line."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from kornia import augmentation as K

from lightning_cnn.errors import raise_all

MENU: dict[str, Callable[[], list[Any]]] = {
    "flip": lambda: [K.RandomHorizontalFlip(p=0.5)],
    "affine": lambda: [K.RandomAffine(15.0, (0.1, 0.1), (0.9, 1.1), 10.0, p=1.0)],
    "jitter": lambda: [K.ColorJiggle(0.4, 0.4, 0.4, 0.1, p=1.0)],
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
