"""Real handwritten digits that need no download: 1,797 grey pictures of 8x8 pixels."""

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_cnn.data._loader import Resumable
from lightning_cnn.errors import ConfigurationError, raise_all
from lightning_cnn.functional import counter

TEST, VALIDATION = 600, 200


class Digits(L.LightningDataModule):
    """scikit-learn's handwritten digits as uint8 pictures (b, channels, size_px, size_px), labels and sample indices.

    600 test and 200 validation pictures are the same whatever the seed, so runs can be paired; `seed` orders the training pictures and
    chooses the labelled ones.

    Args:
        shots: labelled training pictures a class, or all of the other 997.
        size_px: edge length; pictures are enlarged bilinearly.
        channels: 1, or 3 equal ones.

    Raises:
        ConfigurationError: at `setup`, listing every argument that cannot be met.
    """

    classes = [str(digit) for digit in range(10)]  # noqa: RUF012

    def __init__(
        self,
        *,
        shots: int | None = None,
        batch_size: int = 64,
        size_px: int = 8,
        channels: int = 1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.shots, self.batch_size, self.size_px, self.channels = shots, batch_size, size_px, channels
        self.seed, self.num_workers = seed, num_workers

    def setup(self, stage: str | None = None) -> None:
        raise_all(self._problems(), ConfigurationError)
        image, label = _digits(self.size_px, self.channels)
        order = counter.permutation(counter.key(0, "digits", "split"), len(label))
        test, validation, train = order.split([TEST, VALIDATION, len(label) - TEST - VALIDATION])
        if self.shots is not None:
            train = train[counter.permutation(counter.key(self.seed, "digits", "shots"), len(train))]
            train = torch.cat([train[label[train] == digit][: self.shots] for digit in range(10)])
        self.train, self.validation, self.test = (TensorDataset(image[part], label[part]) for part in (train, validation, test))

    def train_dataloader(self) -> Resumable:
        batch_size = min(self.batch_size, len(self.train))
        return Resumable(self.train, batch_size=batch_size, shuffle=True, seed=self.seed, num_workers=self.num_workers)

    def val_dataloader(self) -> Resumable:
        return Resumable(self.validation, batch_size=max(self.batch_size, 200), shuffle=False)

    def test_dataloader(self) -> Resumable:
        return Resumable(self.test, batch_size=max(self.batch_size, 200), shuffle=False)

    predict_dataloader = test_dataloader

    def _problems(self) -> list[str]:
        problems = []
        if self.shots is not None and not 1 <= self.shots <= 85:
            problems.append(f"shots={self.shots}: the rarest digit has 85 training pictures; choose 1 to 85, or null for all")
        if self.size_px < 8:
            problems.append(f"size_px={self.size_px}: the pictures have 8x8 pixels; choose 8 or more")
        if self.channels not in (1, 3):
            problems.append(f"channels={self.channels}: choose 1 or 3")
        if self.batch_size < 1:
            problems.append(f"batch_size={self.batch_size}: choose 1 or more")
        return problems


def _digits(size_px: int, channels: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, label = load_digits(return_X_y=True)
    image = torch.from_numpy(pixels.astype(np.float32)).view(-1, 1, 8, 8) * (255 / 16)
    if size_px != 8:
        image = F.interpolate(image, size=(size_px, size_px), mode="bilinear", align_corners=False)
    image = image.round().clamp(0, 255).to(torch.uint8).expand(-1, channels, -1, -1).contiguous()
    return image, torch.from_numpy(label).long()
