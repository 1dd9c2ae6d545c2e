"""Test-time noise, one axis each. A `View` turns one member into `count` members; several views multiply.

This file holds the views of the picture. Those of the network are in `_network_views`, those of the weights in `_weight_views`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_cnn.errors import ConfigurationError, DataError, raise_all
from lightning_cnn.functional import counter


@dataclass(frozen=True)
class Place:
    """Where views work: the module whose forward gives logits, and what surrounds it (nothing outside of a Trainer)."""

    target: nn.Module
    name: str = ""
    module: LightningModule | None = None
    trainer: Trainer | None = None


def place_of(module: LightningModule, name: str | None, trainer: Trainer) -> Place:
    """The place of the submodule called `name`, or of the module itself."""
    if not name:
        return Place(module, "", module, trainer)
    found = dict(module.named_modules())
    if name not in found:
        near = get_close_matches(name, found, n=1) or [child for child, _ in module.named_children()]
        raise ConfigurationError(f"module={name!r} is no part of {type(module).__name__}. Is it one of {', '.join(near)}?")
    return Place(found[name], name, module, trainer)


class View:
    """One axis of test-time noise. A kind of view overrides the one of `pictures`, `weights` and `layers` that it is about."""

    count: int = 1
    random: bool = False  # whether `pictures` depend on which samples they are

    def problems(self, place: Place) -> list[str]:
        """What keeps this view from working here; asked before anything runs."""
        return []

    def attach(self, place: Place) -> None:
        """Read what is needed from files or loaders; called when a stage starts."""

    def pictures(self, image: Tensor, sample: Tensor) -> Iterator[Tensor]:
        """The `count` pictures for each picture of a batch."""
        yield image

    def weights(self, target: nn.Module, member: int) -> AbstractContextManager:
        """Inside, `target` holds the weights of one member."""
        return nullcontext()

    def layers(self, target: nn.Module) -> dict[str, nn.Module]:
        """The layers that are random in testing, by name."""
        return {}

    @property
    def inside(self) -> bool:
        """Whether members differ inside of the network, so that one frozen copy of it cannot answer for them all."""
        return type(self).weights is not View.weights or type(self).layers is not View.layers

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.count})"


class HorizontalFlip(View):
    """The picture and its mirror image."""

    count = 2

    def pictures(self, image: Tensor, sample: Tensor) -> Iterator[Tensor]:
        yield image
        yield image.flip(-1)


class FiveCrop(View):
    """Four corners and the centre, `size` pixels (one number, or height and width); Krizhevsky et al. 2012."""

    count = 5

    def __init__(self, size: int | Sequence[int]) -> None:
        self.height, self.width = (size, size) if isinstance(size, int) else tuple(size)

    def pictures(self, image: Tensor, sample: Tensor) -> Iterator[Tensor]:
        below, right = image.shape[-2] - self.height, image.shape[-1] - self.width
        if below < 0 or right < 0:
            raise DataError(
                f"{type(self).__name__} cuts {self.height}x{self.width} pixels from pictures of {image.shape[-2]}x{image.shape[-1]}. "
                "Choose a smaller size, or put MultiScale before it."
            )
        for top, left in ((0, 0), (0, right), (below, 0), (below, right), (round(below / 2), round(right / 2))):
            yield image[..., top : top + self.height, left : left + self.width]


class TenCrop(FiveCrop):
    """Five crops of the picture and five of its mirror image."""

    count = 10

    def pictures(self, image: Tensor, sample: Tensor) -> Iterator[Tensor]:
        yield from super().pictures(image, sample)
        yield from super().pictures(image.flip(-1), sample)


class MultiScale(View):
    """The picture with its shorter side resized to each of `sizes` pixels (bilinear, antialiased).

    Alone, whole resized pictures go through the network, which must take any size (fully convolutional); followed by `TenCrop(224)`
    it is ResNet's protocol.
    """

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        self.count = len(sizes)
        raise_all(["MultiScale needs sizes in pixels: MultiScale(224, 256, 384)."] if not sizes else [])

    def pictures(self, image: Tensor, sample: Tensor) -> Iterator[Tensor]:
        height, width = image.shape[-2:]
        for size in self.sizes:
            scale = size / min(height, width)
            shape = (round(height * scale), round(width * scale))
            yield image if shape == (height, width) else F.interpolate(image, shape, mode="bilinear", antialias=True)


class Augmented(View):
    """`n` draws of the training noise itself: of the Trainer's BatchAugmentation, or of `augment` (what that takes)."""

    random = True

    def __init__(self, n: int = 8, augment: Any = None, seed: int = 0) -> None:
        from lightning_cnn.callbacks.batch_augmentation import BatchAugmentation

        self.count, self.seed = n, seed
        self.augmentations = [BatchAugmentation(augment=augment)] if augment is not None else []
        self.found = bool(self.augmentations)

    def problems(self, place: Place) -> list[str]:
        if self.found or _augmentations(place):
            return []
        return ["Augmented repeats the training noise, but there is no BatchAugmentation. Add one, or give Augmented(n, augment=...)."]

    def attach(self, place: Place) -> None:
        if not self.found:
            self.augmentations = _augmentations(place)

    def pictures(self, image: Tensor, sample: Tensor) -> Iterator[Tensor]:
        for draw in range(self.count):
            picture = image
            for nth, augmentation in enumerate(self.augmentations):
                key = counter.key(self.seed, "augmented", draw, nth)
                with torch.autocast(image.device.type, enabled=False):
                    picture = augmentation.augmented(picture, key=key, index=sample.cpu())[0]
            yield picture


def _augmentations(place: Place) -> list[Any]:
    callbacks = vars(place.trainer)["callbacks"] if place.trainer is not None else []
    return [callback for callback in callbacks if hasattr(callback, "augmented")]


def read_views(views: Sequence[Any], words: Mapping[str, type[View]]) -> list[View]:
    """Views as given in code, or as words of the shell: `flip`, `{ten_crop: 24}`, `{multi_scale: [24, 32]}`."""
    return [view if isinstance(view, View) else _from_word(view, words) for view in views]


def _from_word(given: Any, words: Mapping[str, type[View]]) -> View:
    word: Any
    word, arguments = next(iter(given.items())) if isinstance(given, Mapping) and len(given) == 1 else (given, ())
    if not isinstance(word, str) or word not in words:
        raise ConfigurationError(f"{given!r} is no view. Give an object such as HorizontalFlip(), or a word: {', '.join(words)}.")
    if isinstance(arguments, Mapping):
        return words[word](**arguments)
    several = word == "multi_scale" and not isinstance(arguments, int)
    return words[word](*(arguments if several or arguments == () else [arguments]))
