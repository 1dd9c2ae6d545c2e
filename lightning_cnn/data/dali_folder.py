"""A folder of pictures through DALI: decoded on the GPU where there is one, augmented, and exactly resumable."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
from PIL import Image

from lightning_cnn.data._dali import DALILoader, device_id
from lightning_cnn.data._lanes import Augment, Crop
from lightning_cnn.data._order import Order, shuffled
from lightning_cnn.data._sources import FolderSource
from lightning_cnn.errors import DataError, raise_all

TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class DALIFolder(L.LightningDataModule):
    """`root/train/<class>/...` and `root/val/<class>/...` as JPEG, PNG, WebP, BMP or TIFF, read by one DALI pipeline.

    Training crops and flips are those of `PackedDataModule` (`crop`, `area`, `ratio`, `flip`), drawn from (seed, epoch, sample);
    evaluation takes a central square. Pictures are channels_last: floats in [0, 1], normalised where `mean` and `std` are given.
    """

    def __init__(
        self,
        *,
        root: str,
        size_px: int = 224,
        batch_size: int = 128,
        crop: Crop = "resized",
        area: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        central: float = 0.875,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        dtype: Literal["float32", "uint8"] = "float32",
        threads: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root, self.size_px, self.batch_size, self.threads, self.seed = str(root), size_px, batch_size, threads, seed
        self.crop, self.area, self.ratio, self.flip, self.central = crop, tuple(area), tuple(ratio), flip, central
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), dtype
        self._files: dict[str, FolderStored] = {}

    def setup(self, stage: str | None = None) -> None:
        problems = []
        if self.crop not in ("resized", "center"):
            problems.append(f"crop must be 'resized' or 'center', got {self.crop!r}.")
        if self.size_px < 1 or self.batch_size < 1:
            problems.append(f"size_px and batch_size must be at least 1, got {self.size_px} and {self.batch_size}.")
        if self.dtype not in ("float32", "uint8"):
            problems.append(f"dtype must be 'float32' or 'uint8', got {self.dtype!r}.")
        raise_all(problems)
        for split in ("train", "val"):
            self._opened(split)

    @property
    def classes(self) -> list[str]:
        return self._opened("train").classes

    def train_dataloader(self) -> DALILoader:
        return self._loader("train")

    def val_dataloader(self) -> DALILoader:
        return self._loader("val")

    test_dataloader = predict_dataloader = val_dataloader

    def _opened(self, split: str) -> "FolderStored":
        folder = Path(self.root, split)
        if not folder.is_dir():
            raise DataError(f"There is no folder {folder}. Expected {self.root}/train/<class>/<picture> and {self.root}/val/....")
        if split not in self._files:
            self._files[split] = FolderStored(folder)
        return self._files[split]

    def _loader(self, split: str) -> DALILoader:
        stored, training = self._opened(split), split == "train"
        draw = shuffled(len(stored.labels)) if training and not getattr(self.trainer, "overfit_batches", 0) else None
        colour = {"mean": self.mean, "std": self.std, "dtype": getattr(torch, self.dtype)}
        crop, flip = (self.crop, self.flip) if training else ("center", 0.0)
        augment = Augment(self.size_px, crop, self.area, self.ratio, 0, self.central, flip, **colour)  # type: ignore[arg-type]
        order = Order(len(stored.labels), self.batch_size, self.seed, False, draw)
        return DALILoader(stored, augment, order, seed=self.seed, threads=self.threads, ahead=2, device_id=device_id(self.trainer))


class FolderStored:
    """The encoded files of a folder; a size is read from a file's header when it is first needed."""

    encoded = True

    def __init__(self, root: Path) -> None:
        self._source = FolderSource(root)
        self.classes = self._source.classes
        self.labels = np.array(self._source.labels, np.int64)
        self._sizes = np.zeros((len(self.labels), 2), np.int64)

    def read(self, index: int) -> np.ndarray:
        return np.fromfile(self._source.name(index), np.uint8)

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for index in indices[self._sizes[indices, 0] == 0]:
            self._sizes[index] = _upright_size(self.name(int(index)))
        return self._sizes[indices, 0], self._sizes[indices, 1]

    def name(self, index: int) -> str:
        return self._source.name(index)

    def fetched(self, plan: Sequence[np.ndarray]) -> AbstractContextManager[None]:
        return nullcontext()


def _upright_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in TRANSPOSED
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be decoded: {error}. Mend it, or take it out.") from error
