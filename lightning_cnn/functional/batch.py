"""A batch that knows which samples it holds, and still unpacks as `image, label = batch`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_cnn.errors import ConfigurationError

IMAGE_NAMES = ("image", "images", "img", "x", "input", "inputs", "pixel_values")
LABEL_NAMES = ("label", "labels", "y", "target", "targets")


@dataclass
class Batch:
    """`image` (b c h w), `label` (b, or b k for soft labels), `index` (b, int64): the sample's position in its dataset.

    It unpacks, indexes and measures like the pair `(image, label)`, so a LightningModule written for pairs needs no change; noise
    keyed by sample reads `index`. A dataclass, because Lightning's transfer and precision code rebuild dataclasses field by field
    and would drop an attribute hung on a tuple.
    """

    image: Tensor
    label: Tensor
    index: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.image, self.label))

    def __getitem__(self, item: int) -> Tensor:
        return (self.image, self.label)[item]

    def __len__(self) -> int:
        return 2

    def replace(self, **changes: Tensor) -> "Batch":
        return replace(self, **changes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return Batch(*(getattr(self, name).to(device, non_blocking=non_blocking) for name in ("image", "label", "index")))

    def pin_memory(self) -> "Batch":
        return Batch(self.image.pin_memory(), self.label.pin_memory(), self.index.pin_memory())


def image_key(batch: Any) -> str | int:
    """Where the images of any batch are: a usual name of a mapping or dataclass, else the first place of a sequence."""
    return _key(batch, IMAGE_NAMES, 0, "images")


def label_key(batch: Any) -> str | int:
    """Where the labels of any batch are: a usual name of a mapping or dataclass, else the second place of a sequence."""
    return _key(batch, LABEL_NAMES, 1, "labels")


def read(batch: Any, key: str | int) -> Any:
    """The value at `key` of a mapping, dataclass, tuple, named tuple, list, or of a bare tensor (key 0)."""
    if type(batch) is Tensor:
        return batch
    return getattr(batch, key) if isinstance(key, str) and not isinstance(batch, Mapping) else batch[key]


def write(batch: Any, changes: Mapping[Any, Any]) -> Any:
    """A batch of the same type with the values of `changes` in place; the given one is left as it is."""
    kind: Any = type(batch)
    if kind is Tensor:
        return changes[0]
    if isinstance(batch, Mapping):
        return kind({**batch, **changes})
    if is_dataclass(kind):
        return replace(batch, **changes)
    values = [changes.get(place, value) for place, value in enumerate(batch)]
    return kind(*values) if hasattr(kind, "_fields") else kind(values)


def _key(batch: Any, names: tuple[str, ...], place: int, what: str) -> str | int:
    if isinstance(batch, Tensor) and place == 0:
        return 0
    if isinstance(batch, (tuple, list)) and len(batch) > place:
        return place
    present = list(batch) if isinstance(batch, Mapping) else [f.name for f in fields(batch)] if is_dataclass(batch) else []
    for name in names:
        if name in present:
            return name
    found = f"a {type(batch).__name__}" + (f" with {present}" if present else "")
    raise ConfigurationError(f"The {what} of a batch were not found; the batch is {found}. Name them {' or '.join(names[:2])}.")
