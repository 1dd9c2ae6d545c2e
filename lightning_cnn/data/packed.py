"""Packed files for a Trainer: the disk reads a stream, the CPU does what is left in one pass, and the state is a position."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch

from lightning_cnn.data._images import PackedImages, Verify
from lightning_cnn.data._lanes import Augment, Crop, FusedLane, GatherLane, PackedLoader
from lightning_cnn.data._loader import CountedLoader
from lightning_cnn.data._order import Draw, Order, balanced, shards_at_once, shuffled, weighted, windowed, within
from lightning_cnn.data._resident import ResidentLoader, Store, require_room
from lightning_cnn.errors import ConfigurationError, DataError, raise_all

log = logging.getLogger(__name__)
LANES, CROPS, DTYPES, ORDERS = (
    ("auto", "gather", "fused", "dali"),
    ("resized", "padded", "center"),
    ("float32", "uint8"),
    ("shuffled", "balanced", "windowed"),
)
Paths = str | Path | Sequence[str | Path] | None


class PackedDataModule(L.LightningDataModule):
    """Batches from packed files (`pack`), resumable inside an epoch to the bit.

    `lane`: `gather` delivers whole stored pictures as uint8, for an accelerator that augments them; `fused` crops, scales, flips and
    converts on the CPU; `dali` does the work of `fused` in a DALI pipeline, on the GPU where there is one; `auto` is `gather` where
    there is an accelerator, else `fused`. All have one order and, for one sample of one epoch, one noise. Pictures are channels_last:
    floats in [0, 1], or normalised where `mean` and `std` are given.

    Args:
        train, val, test, predict: a packed file, a list of shards or a pattern, or a URL of one; test falls back to val, predict to test.
        crop: how `fused` cuts training pictures (see `Augment`); evaluation takes a central square of `central` times the shorter side.
        order: `shuffled`, `balanced` (every class equally often), or `windowed`: shards in random order, samples shuffled among
            `window` shards, for shards at URLs that outgrow the local disk. `weights`, one a sample, takes the place of it.
        subset: indices of the training samples to use.
        threads: of the lane; by default as many as there are cores. `ahead`: batches made before they are asked for.
        cache: `device` keeps all stored pictures of a split on the device (in RAM on a CPU), for lane `gather`.
        cache_folder, cache_gb: where shards at URLs are kept, and how much of them at a time; each process has its own part.
    """

    def __init__(
        self,
        *,
        train: Paths = None,
        val: Paths = None,
        test: Paths = None,
        predict: Paths = None,
        batch_size: int = 128,
        lane: Literal["auto", "gather", "fused", "dali"] = "auto",
        size: int | None = None,
        crop: Crop = "resized",
        area: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        padding: int = 4,
        flip: float = 0.5,
        central: float | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        dtype: Literal["float32", "uint8"] = "float32",
        order: Literal["shuffled", "balanced", "windowed"] = "shuffled",
        window: int = 4,
        weights: Sequence[float] | None = None,
        subset: Sequence[int] | None = None,
        drop_last: bool = False,
        threads: int | None = None,
        ahead: int = 2,
        verify: Verify = "sample",
        cache: Literal["device"] | None = None,
        cache_folder: str | Path | None = None,
        cache_gb: float = 50.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.paths = {"train": train, "val": val, "test": test or val, "predict": predict or test or val}
        self.batch_size, self.lane, self.size, self.crop = batch_size, lane, size, crop
        self.area, self.ratio, self.padding, self.flip, self.central = tuple(area), tuple(ratio), padding, flip, central
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), dtype
        self.order, self.weights, self.subset, self.drop_last = order, weights, subset, drop_last
        self.threads, self.ahead, self.seed = threads, ahead, seed
        self.window, self.cache, self.cache_folder, self.cache_gb = window, cache, cache_folder, cache_gb
        self.verify: Verify = verify
        self._images: dict[str, PackedImages] = {}
        self._stores: dict[tuple[PackedImages, torch.device], Store] = {}

    def setup(self, stage: str | None = None) -> None:
        """Open what `stage` needs and check every argument against it."""
        raise_all(self._problems())
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
        files = {self._open(split) for split in splits.get(str(stage), self.paths)} - {None}
        if self.cache == "device":
            stores = [self._store(images) for images in files if images is not None]
            require_room(stores, self._device(), 1 if self.trainer is None else self.trainer.num_devices)
        opened = ", ".join(f"{split}: {len(images)} pictures" for split, images in self._images.items())
        log.info("lane %s of %s", self._lane_name(), opened)

    @property
    def classes(self) -> list[str]:
        """Names of the classes as the files state them; their numbers where they state none."""
        images = self._open("train") or self._open("val") or self._open("test") or self._open("predict")
        if images is None:
            raise ConfigurationError("Name a packed file: train=, val=, test= or predict=.")
        return images.classes or [str(label) for label in range(int(images.labels.max()) + 1)]

    def train_dataloader(self) -> CountedLoader:
        return self.loader("train", shuffle=not (getattr(self.trainer, "overfit_batches", 0)))

    def val_dataloader(self) -> CountedLoader | list[Any]:
        return self.loader("val") if self.paths["val"] else []

    def test_dataloader(self) -> CountedLoader:
        return self.loader("test")

    def predict_dataloader(self) -> CountedLoader:
        return self.loader("predict")

    def loader(self, split: str, shuffle: bool = False) -> CountedLoader:
        """The loader of one split, for use without a Trainer too. Evaluation delivers every sample, in the file's order."""
        images = self._open(split)
        if images is None:
            raise ConfigurationError(f"There is no packed file for {split}: pass {split}=FILE.")
        training = split == "train"
        subset = np.asarray(self.subset, np.int64) if training and self.subset is not None else np.arange(len(images))
        draw = self._draw(images, subset) if training and shuffle else None
        chosen = within(subset, draw, len(images))
        order = Order(len(subset), self.batch_size, self.seed, self.drop_last and training, chosen, *self._place(), images.fingerprint)
        threads, augment = self._threads(), self._augment(images, training)
        if self._lane_name() == "dali":
            return self._dali(images, augment, order, threads)
        if self.cache == "device":
            return ResidentLoader(self._store(images), order)
        lane = GatherLane(images) if self._lane_name() == "gather" else FusedLane(images, augment, self.seed)
        return PackedLoader(lane, images.labels, order, threads=threads, ahead=self.ahead, pinned=self._accelerated())

    def _dali(self, images: PackedImages, augment: Augment, order: Order, threads: int) -> CountedLoader:
        from lightning_cnn.data._dali import DALILoader, PackedStored, device_id

        device = device_id(self.trainer)
        return DALILoader(PackedStored(images), augment, order, seed=self.seed, threads=threads, ahead=self.ahead, device_id=device)

    def _open(self, split: str) -> PackedImages | None:
        path = self.paths[split]
        if path is not None and split not in self._images:
            alike = (images for other, images in self._images.items() if self.paths[other] == path and images.remote is None)
            shared = next(alike, None)
            place = {"cache_folder": self.cache_folder, "cache_gb": self.cache_gb}
            self._images[split] = shared or PackedImages(path, verify=self.verify, **place)
            self._check(split, self._images[split])
            self._check_cache(split, self._images[split])
        return self._images.get(split)

    def _store(self, images: PackedImages) -> Store:
        """One for all loaders of some files."""
        key = images, self._device()
        if key not in self._stores:
            self._stores[key] = Store(*key, self._threads())
        return self._stores[key]

    def _augment(self, images: PackedImages, training: bool) -> Augment:
        size = self.size or min(images.shape or (0,))
        colour = {"mean": self.mean, "std": self.std, "dtype": getattr(torch, self.dtype)}
        if not training:
            central = self.central or (0.875 if self.crop == "resized" else 1.0)
            return Augment(size, "center", central=central, flip=0.0, **colour)
        return Augment(size, self.crop, self.area, self.ratio, self.padding, self.central or 1.0, self.flip, **colour)  # type: ignore[arg-type]

    def _draw(self, images: PackedImages, subset: np.ndarray) -> Draw:
        if self.weights is not None:
            return weighted(np.asarray(self.weights, np.float64))
        if self.order == "windowed":
            return windowed(np.diff(images.starts).tolist(), self.window)
        return balanced(images.labels[subset]) if self.order == "balanced" else shuffled(len(subset))

    def _place(self) -> tuple[int | None, int | None]:
        """(replicas, rank) as the strategy sees them: ranks that split a model see the same data."""
        if self.trainer is None or not self.trainer._accelerator_connector.is_distributed:
            return None, None
        place = self.trainer.distributed_sampler_kwargs or {}
        return place.get("num_replicas"), place.get("rank")

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    def _accelerated(self) -> bool:
        return self._device().type == "cuda"

    def _lane_name(self) -> str:
        if self.lane == "auto" and self.cache == "device":
            return "gather"
        return ("gather" if self._accelerated() else "fused") if self.lane == "auto" else self.lane

    def _problems(self) -> Iterator[str]:
        for name, value, allowed in (
            ("lane", self.lane, LANES), ("crop", self.crop, CROPS), ("dtype", self.dtype, DTYPES), ("order", self.order, ORDERS)
        ):  # fmt: skip
            if value not in allowed:
                yield f"{name} must be one of {allowed}, got {value!r}."
        if not any(self.paths.values()):
            yield "Name a packed file: train=, val=, test= or predict=."
        if self.size is not None and self.size < 1:
            yield f"size must be at least 1 pixel, or None for the stored size; got {self.size}."
        if not 0 <= self.flip <= 1:
            yield f"flip is a probability, got {self.flip}."
        if not (0 < self.area[0] <= self.area[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            yield f"area must rise within (0, 1] and ratio be positive and rise; got {self.area} and {self.ratio}."
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            yield f"mean and std need three numbers each, std above 0; got {self.mean} and {self.std}."
        if self.cache not in (None, "device"):
            yield f"cache must be None or 'device', got {self.cache!r}."
        if self.cache == "device" and self._lane_name() != "gather":
            yield f"cache='device' keeps stored pictures, which lane='gather' delivers; lane is {self._lane_name()!r}."
        if self.order == "windowed" and (self.subset is not None or self.window < 1):
            yield f"order='windowed' takes whole shards, and window={self.window} must be at least 1; leave subset out."
        if self.ahead < 1 or (self.threads is not None and self.threads < 1):
            yield f"ahead and threads must be at least 1, got {self.ahead} and {self.threads}."

    def _check(self, split: str, images: PackedImages) -> None:
        """Every argument against one opened split."""
        problems, lane = [], self._lane_name()
        if lane == "gather" and self.size not in (None, *(images.shape or ())):
            problems.append(f"{split}: lane='gather' delivers the stored {images.shape}; size={self.size} needs lane='fused'.")
        if lane != "gather" and self.size is None and images.shape is None:
            problems.append(f"{split}: the samples differ in size; say which size= to deliver.")
        if split == "train":
            problems += self._training_problems(images)
        raise_all(problems, DataError)

    def _check_cache(self, split: str, images: PackedImages) -> None:
        """Whether the shards that are read at a time fit into the local cache, in every epoch."""
        if images.remote is None:
            return
        used, window, batch = np.arange(len(images.files)), 1, self.batch_size + 2  # for the tail that may join the last batch
        if self.cache == "device":
            batch = self._store(images).batch_size + 1
        elif split == "train":
            used = used if self.subset is None else images.shards(np.asarray(self.subset))
            window = self.window if self.order == "windowed" and self.weights is None else len(used)
        once = shards_at_once(np.diff(images.starts)[used].tolist(), window, batch)
        images.remote.check_room(sum(sorted(images.remote.size(int(shard)) for shard in used)[-once:]))

    def _training_problems(self, images: PackedImages) -> Iterator[str]:
        smallest = (
            min(images.shape) if images.shape else min(int(min(f.index["height"].min(), f.index["width"].min())) for f in images.files)
        )
        if self._lane_name() != "gather" and self.crop == "padded" and (self.size or smallest) > smallest + 2 * self.padding:
            yield f"train: crop='padded' cannot cut {self.size} pixels from {smallest} and a padding of {self.padding}."
        if self.subset is not None and (not len(self.subset) or min(self.subset) < 0 or max(self.subset) >= len(images)):
            yield f"train: subset must name samples from 0 to {len(images) - 1}."
        samples = len(images if self.subset is None else self.subset)
        if self.weights is not None and (len(self.weights) != samples or min(self.weights) < 0 or not sum(self.weights)):
            yield f"train: weights needs {samples} numbers of at least 0, one a training sample; got {len(self.weights)}."
