"""What a lane does with a batch: read stored samples into a buffer, with the noise of (seed, epoch, sample) and nothing else.

A lane is asked for slices of a batch by several threads at once; an entry depends on its own sample only, so threads, batch size and
ranks change no pixel.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch

from lightning_cnn.data._images import PackedImages
from lightning_cnn.data._loader import CountedLoader
from lightning_cnn.data._order import Order
from lightning_cnn.data._remote import Ahead
from lightning_cnn.data._ring import Ring
from lightning_cnn.errors import DataError
from lightning_cnn.functional import counter
from lightning_cnn.functional.batch import Batch
from lightning_cnn.kernels import resample

Crop = Literal["resized", "padded", "center"]


@dataclass(frozen=True)
class Augment:
    """Which part of a picture is delivered, at `size` pixels square, and how it is coloured.

    `crop`: `resized` is RandomResizedCrop (`area`, `ratio`), `padded` a random crop of the picture with `padding` black pixels around,
    `center` a central square of `central` times the shorter side, scaled to `size`. `flip` is a probability. Floats are
    `(value / 255 - mean) / std`; uint8 is delivered as it is, rounded.
    """

    size: int
    crop: Crop = "resized"
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    central: float = 1.0
    flip: float = 0.5
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    dtype: torch.dtype = torch.float32

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """(scale, bias) for the kernels."""
        if self.dtype == torch.uint8:
            # Kernels cut: half a level more makes that rounding. A padded crop copies levels, which half a level does not move.
            return np.ones(3, np.float32), np.full(3, 0.5, np.float32)
        mean, std = np.array(self.mean, np.float64), np.array(self.std, np.float64)
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def draw(self, key: int, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The boxes (top, left, height, width) and flips of some samples."""
        box, flip = np.empty((len(indices), 4), np.int64), np.zeros(len(indices), np.bool_)
        if self.crop == "resized":
            resample.random_resized_boxes(key, indices, heights, widths, np.array(self.area), np.log(np.array(self.ratio)), box)
        elif self.crop == "padded":
            resample.random_places(key, indices, heights, widths, self.size, self.padding, box)
        else:
            side = np.maximum(np.rint(self.central * np.minimum(heights, widths)), 1).astype(np.int64)
            box[:] = np.stack([(heights - side) // 2, (widths - side) // 2, side, side], 1)
        if self.flip:
            resample.random_flips(key, indices, self.flip, flip)
        return box, flip


class GatherLane:
    """Whole stored pictures as uint8: the augmentation is the accelerator's."""

    dtype = torch.uint8

    def __init__(self, images: PackedImages) -> None:
        if images.shape is None:
            raise DataError("lane='gather' needs samples of one size. Pack with fit='crop', or use lane='fused'.")
        self.images, self.shape = images, images.shape

    def fill(self, epoch: int, indices: np.ndarray, out: np.ndarray) -> None:
        indices, flat = indices % len(self.images), out.reshape(len(out), -1)
        for file, entry, rows in self.images.by_file(indices):
            source, offset, chosen = file.bytes, rows["offset"].astype(np.int64), indices[entry]
            if file.codec == "jpeg":
                source, offset = self.images.crops(file, rows, chosen, np.tile((0, 0, *self.shape), (len(entry), 1)))
            wrong = resample.gather(source, offset, flat, entry, self.images.pending(chosen, rows))
            self.images.passed(chosen, wrong)


class FusedLane:
    """Crop, scale, flip, normalise and lay out on the CPU, in one pass from the stored bytes."""

    def __init__(self, images: PackedImages, augment: Augment, seed: int) -> None:
        self.images, self._augment, self._seed = images, augment, seed
        self.shape, self.dtype = (augment.size, augment.size), augment.dtype

    def fill(self, epoch: int, indices: np.ndarray, out: np.ndarray) -> None:
        key, drawn, indices = counter.key(self._seed, "augment", epoch), indices, indices % len(self.images)
        for file, entry, rows in self.images.by_file(indices):
            heights, widths, chosen = rows["height"].astype(np.int64), rows["width"].astype(np.int64), indices[entry]
            box, flip = self._augment.draw(key, drawn[entry], heights, widths)
            source, offset = file.bytes, rows["offset"].astype(np.int64)
            if file.codec == "jpeg":
                # Decode what the box shows of each picture; then that is the picture.
                shown = _within(box, heights, widths)
                source, offset = self.images.crops(file, rows, chosen, shown)
                box, heights, widths = box - shown * (1, 1, 0, 0), shown[:, 2], shown[:, 3]
            size = (heights, widths) if self._augment.crop == "padded" else (widths,)
            kernel: Any = resample.crop_padded if self._augment.crop == "padded" else resample.crop_resize
            check = self.images.pending(chosen, rows)
            self.images.passed(chosen, kernel(source, offset, *size, box, flip, *self._augment.affine(), out, entry, check))


def _within(box: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The part of each box that lies in its picture, and a pixel of the picture at least."""
    limit = np.stack([heights, widths], 1)
    first = np.clip(box[:, :2], 0, limit - 1)
    last = np.clip(box[:, :2] + box[:, 2:], first + 1, limit)
    return np.concatenate([first, last - first], 1)


class PackedLoader(CountedLoader):
    """Batches of a lane, made ahead by GIL-free threads that share each batch between them."""

    def __init__(
        self, lane: GatherLane | FusedLane, labels: np.ndarray, order: Order, *, threads: int, ahead: int, pinned: bool
    ) -> None:
        super().__init__(order)
        self._lane, self._labels, self._threads, self._ahead = lane, torch.from_numpy(labels), threads, ahead
        # The last batch of an epoch may hold up to two samples more than batch_size (see `Order`).
        self._ring = Ring((order.batch_size + 2, *lane.shape, 3), lane.dtype, pinned)
        self._pinned = pinned

    def _load(self, epoch: int, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="lane")
        with pool, self._lane.images.fetched(plan, [len(self._parts(indices)) for indices in plan]) as ahead:
            jobs = (self._start(pool, ahead, number, epoch, indices) for number, indices in enumerate(plan))
            begun = deque(islice(jobs, self._ahead))
            try:
                while begun:
                    batch, parts = begun.popleft()
                    for part in parts:
                        part.result()
                    begun.extend(islice(jobs, 1))
                    yield batch
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _start(
        self, pool: ThreadPoolExecutor, ahead: Ahead | None, number: int, epoch: int, indices: np.ndarray
    ) -> tuple[Batch, list[Future[None]]]:
        image = self._ring.take(len(indices))
        out = image.numpy()
        parts = [pool.submit(self._fill, ahead, number, epoch, indices[part], out[part]) for part in self._parts(indices)]
        index = torch.from_numpy(indices % len(self._labels))
        batch = Batch(image.permute(0, 3, 1, 2), self._labels[index], index)
        return batch, parts

    def _parts(self, indices: np.ndarray) -> list[slice]:
        share = -(-len(indices) // self._threads)
        return [slice(begin, begin + share) for begin in range(0, len(indices), share)]

    def _fill(self, ahead: Ahead | None, number: int, epoch: int, indices: np.ndarray, out: np.ndarray) -> None:
        if ahead is not None:
            ahead.wait(number)
        self._lane.fill(epoch, indices, out)
        if ahead is not None:
            ahead.done(number)
