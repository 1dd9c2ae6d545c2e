"""A batch that knows which samples it holds, and still unpacks as `image, label = batch`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


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
