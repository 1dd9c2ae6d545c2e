"""A DALI pipeline under our order and our noise: on a GPU it decodes there, and it runs on a CPU without a driver.

Crops and flips are drawn here, from (seed, epoch, sample), and passed in; DALI draws nothing. A pipeline is built for each pass, fed
by a callable source and run by the one thread that iterates, so an abandoned pass leaves no batch behind.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lightning_cnn.data._images import PackedImages
from lightning_cnn.data._lanes import Augment
from lightning_cnn.data._loader import CountedLoader
from lightning_cnn.data._order import Order
from lightning_cnn.data._remote import Ahead
from lightning_cnn.errors import ConfigurationError, DataError
from lightning_cnn.functional import counter
from lightning_cnn.functional.batch import Batch


def _dali() -> Any:
    """DALI, loaded when it is used; its stubs know neither a pipeline without a device nor what its operators return."""
    return import_module("nvidia.dali")


class Stored(Protocol):
    """Where samples are read from: encoded files, or pixels (h w 3)."""

    encoded: bool
    labels: np.ndarray

    def read(self, index: int) -> np.ndarray: ...
    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...
    def name(self, index: int) -> str: ...
    def fetched(self, plan: Sequence[np.ndarray]) -> AbstractContextManager[Ahead | None]: ...


class PackedStored:
    """The samples of packed files."""

    def __init__(self, images: PackedImages) -> None:
        self._images, self.labels, self.encoded = images, images.labels, images.codec == "jpeg"

    def read(self, index: int) -> np.ndarray:
        return self._images.stored(index) if self.encoded else self._images.pixels(index)

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        heights, widths = np.empty(len(indices), np.int64), np.empty(len(indices), np.int64)
        for _, entry, rows in self._images.by_file(indices):
            heights[entry], widths[entry] = rows["height"], rows["width"]
        return heights, widths

    def name(self, index: int) -> str:
        file, position = self._images.locate(index)
        return f"{file.path}, sample {position}"

    def fetched(self, plan: Sequence[np.ndarray]) -> AbstractContextManager[Ahead | None]:
        return self._images.fetched(plan, [1] * len(plan))


class DALILoader(CountedLoader):
    """Batches of a DALI pipeline; `device_id=None` runs it on the CPU."""

    def __init__(
        self, stored: Stored, augment: Augment, order: Order, *, seed: int, threads: int, ahead: int, device_id: int | None
    ) -> None:
        super().__init__(order)
        self._stored, self._augment, self._seed = stored, augment, seed
        self._threads, self._ahead, self._device_id = threads, ahead, device_id
        self._labels = torch.from_numpy(stored.labels)

    def _load(self, epoch: int, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        with self._stored.fetched(plan) as ahead:
            pipeline = self._pipeline(epoch, plan, ahead)
            for drawn in plan:
                indices = drawn % len(self._labels)
                try:
                    (output,) = pipeline.run()
                except RuntimeError as error:
                    raise self._named(plan, error) from error
                index = torch.from_numpy(indices)
                yield Batch(self._tensor(output), self._labels[index], index)

    def _pipeline(self, epoch: int, plan: Sequence[np.ndarray], ahead: Ahead | None) -> Any:
        dali = _dali()

        def feed(info: Any) -> tuple[list[np.ndarray], ...]:
            if info.iteration >= len(plan):
                raise StopIteration
            if ahead is not None:
                if info.iteration:
                    ahead.done(info.iteration - 1)  # DALI has copied what it was fed before
                ahead.wait(info.iteration)
            return self._inputs(epoch, plan[info.iteration])

        @dali.pipeline_def(
            batch_size=max(len(indices) for indices in plan),
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=self._ahead,
        )
        def steps() -> Any:
            layouts = ["" if self._stored.encoded else "HWC", "", "", ""]
            stored, start, shape, flip = dali.fn.external_source(
                source=feed, num_outputs=4, batch=True, batch_info=True, layout=layouts
            )
            return self._graph(stored, start, shape, flip)

        pipeline = steps()
        pipeline.build()
        return pipeline

    def _graph(self, stored: Any, start: Any, shape: Any, flip: Any) -> Any:
        dali = _dali()
        fn, types = dali.fn, dali.types
        augment, accelerated = self._augment, self._device_id is not None
        decoder = {"device": "mixed" if accelerated else "cpu", "output_type": types.DALIImageType.RGB}
        if self._stored.encoded and augment.crop != "padded":  # only what the crop shows is decoded
            image = fn.decoders.image_slice(stored, start, shape, axes=[0, 1], **decoder)
        else:
            whole = fn.decoders.image(stored, **decoder) if self._stored.encoded else stored.gpu() if accelerated else stored
            image = fn.slice(whole, start, shape, axes=[0, 1], out_of_bounds_policy="pad", fill_values=[0])
        if augment.crop != "padded":
            linear = types.DALIInterpType.INTERP_LINEAR
            image = fn.resize(image, size=[augment.size] * 2, interp_type=linear, antialias=True, dtype=types.DALIDataType.FLOAT)
        levels = augment.dtype == torch.uint8
        mean, std = ([0.0], [1.0]) if levels else ([255 * v for v in augment.mean], [255 * v for v in augment.std])
        dtype = types.DALIDataType.UINT8 if levels else types.DALIDataType.FLOAT
        return fn.crop_mirror_normalize(image, mirror=flip, mean=mean, std=std, dtype=dtype, output_layout="HWC")

    def _inputs(self, epoch: int, drawn: np.ndarray) -> tuple[list[np.ndarray], ...]:
        indices = drawn % len(self._labels)
        heights, widths = self._stored.sizes(indices)
        box, flip = self._augment.draw(counter.key(self._seed, "augment", epoch), drawn, heights, widths)
        start, shape = [row[:2].astype(np.int32) for row in box], [row[2:].astype(np.int32) for row in box]
        return [self._stored.read(int(i)) for i in indices], start, shape, [np.int32(turned) for turned in flip]  # type: ignore[return-value]

    def _tensor(self, output: Any) -> Tensor:
        # DALI writes the same memory again two batches later.
        image = torch.from_dlpack(output.as_tensor()).clone()
        return image.permute(0, 3, 1, 2)

    def _named(self, plan: Sequence[np.ndarray], error: RuntimeError) -> DataError:
        """The first sample from here on that cannot be read by anybody; else what DALI said."""
        from lightning_cnn.data._sources import decode

        first = self.order.batch % len(self.order) - (len(self.order) - len(plan))
        for index in np.concatenate(plan[first : first + self._ahead + 1]) % len(self._labels) if self._stored.encoded else ():
            try:
                decode(self._stored.read(int(index)).tobytes())
            except (OSError, ValueError, RuntimeError, SyntaxError) as reason:
                return DataError(f"{self._stored.name(int(index))} cannot be decoded: {reason}. Mend it, or take it out.")
        return DataError(f"The DALI pipeline failed: {error}")


def device_id(trainer: L.Trainer | None) -> int | None:
    """The GPU of this rank, or None for the CPU."""
    device = None if trainer is None else trainer.strategy.root_device
    if device is None or device.type == "cpu":
        return None
    if device.type != "cuda":
        raise ConfigurationError(f"DALI runs on CUDA devices and on the CPU, not on {device}. Use lane='fused', or accelerator='cpu'.")
    return device.index or 0
