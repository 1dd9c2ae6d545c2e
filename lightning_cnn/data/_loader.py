"""Loaders whose whole state is a position: the same batches for any number of workers, and resumed inside an epoch to the bit.

Stock shuffled loaders are not (after a resume inside an epoch some samples come twice and as many never). Here the order is a function
of (seed, epoch), the noise of a sample a function of (seed, epoch, index), and the position counts the batches that were *delivered*,
not those that workers have fetched ahead.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lightning_cnn.data._order import Order, shuffled
from lightning_cnn.errors import ConfigurationError, DataError, raise_all
from lightning_cnn.functional import counter
from lightning_cnn.functional.batch import Batch
from lightning_cnn.functional.generators import generators_restored, seed_generators

log = logging.getLogger(__name__)


class CountedLoader(ABC):
    """A sized iterable of `Batch` for `Trainer.fit`, with the position of its `Order` as state.

    It shards itself over the ranks and is no `DataLoader`, so that Lightning injects no `DistributedSampler` whatever
    `use_distributed_sampler` says; it has a length, so that Lightning fetches nothing ahead of the step.
    """

    def __init__(self, order: Order) -> None:
        self.order = order

    @abstractmethod
    def _load(self, epoch: int, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        """The batches of `plan`, each a list of sample indices, with the noise of `epoch`."""

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: the position is settled at the first `next`, when the trainer has said which epoch it is.
        for batch in self._load(*self.order.start()):
            self.order.batch += 1
            yield batch

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for `set_epoch` on a loader of any type."""
        return SimpleNamespace(sampler=self.order)

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.load_state_dict(state)


class Resumable(CountedLoader):
    """Deliver any map-style dataset of (image, label) as `Batch(image, label, index)`, exactly resumable.

    Before each sample is read the global generators of torch, numpy and Python are seeded by (seed, epoch, index), and put back after
    the batch: random transforms inside the dataset become functions of the sample, whichever worker runs them.
    `drop_last=False` delivers every sample exactly once on any number of ranks; see `_order` for how the tail is shared.
    `on_error` is what happens where reading a sample raises a DataError: `raise` it; `skip` the sample, so that its batch is smaller; or
    `report`: skip, and at the end of the epoch raise one error that lists all. `left_out` holds those skipped, each with its reason.
    `num_replicas` and `rank` are only needed where torch.distributed does not know them.
    """

    def __init__(
        self,
        dataset: Dataset | Sequence,
        *,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        on_error: Literal["raise", "skip", "report"] = "raise",
        collate: Callable[[list[Any]], Any] = default_collate,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        samples = len(dataset)  # pyright: ignore[reportArgumentType]  # map-style datasets have a length that their type does not show
        draw = shuffled(samples) if shuffle else None
        super().__init__(Order(samples, batch_size, seed, drop_last, draw, num_replicas, rank))
        if on_error not in ("raise", "skip", "report"):
            raise ConfigurationError(f"on_error must be 'raise', 'skip' or 'report', got {on_error!r}.")
        self.left_out: dict[int, str] = {}
        self._report = on_error == "report"
        self._plan = _Plan()
        self._loader = DataLoader(
            _Batches(dataset, seed, collate, lenient=on_error != "raise"),
            sampler=self._plan,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # else starting an iteration draws from the global one
        )

    def _load(self, epoch: int, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        self._plan.addresses = [(epoch, indices) for indices in plan]
        for batch, left_out in self._loader:
            for index, reason in left_out:
                log.warning("left out sample %d: %s", index, reason)
            self.left_out.update(left_out)
            yield batch
        if self._report:
            raise_all((f"sample {index}: {reason}" for index, reason in sorted(self.left_out.items())), DataError)


class _Plan(Sampler):
    """What a DataLoader reads when iteration starts, so that its workers outlive an epoch."""

    def __init__(self) -> None:
        self.addresses: list[tuple[int, np.ndarray]] = []

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return iter(self.addresses)

    def __len__(self) -> int:
        return len(self.addresses)


class _Batches(Dataset):
    """A dataset whose items are whole batches, addressed by (epoch, sample indices)."""

    def __init__(self, dataset: Any, seed: int, collate: Callable[[list[Any]], Any], lenient: bool) -> None:
        self._dataset, self._seed, self._collate, self._lenient = dataset, seed, collate, lenient

    def __getitem__(self, address: tuple[int, np.ndarray]) -> tuple[Batch, list[tuple[int, str]]]:
        epoch, indices = address
        samples, left_out = {}, []
        with generators_restored():
            for index in map(int, indices):
                try:
                    samples[index] = self._sample(epoch, index)
                except DataError as error:
                    if not self._lenient:
                        raise
                    left_out.append((index, str(error)))
        if not samples:
            raise DataError(f"No sample of a batch can be read; the first of {len(left_out)}: {left_out[0][1]}")
        images, labels = zip(*samples.values(), strict=True)
        read = np.fromiter(samples, np.int64)
        return Batch(self._stack(images, read), self._collate(list(labels)), torch.from_numpy(read)), left_out

    def _sample(self, epoch: int, index: int) -> tuple[Any, Any]:
        seed_generators(counter.key(self._seed, "sample", epoch, index))
        image, label = self._dataset[index]
        return image, label

    def _stack(self, images: tuple[Any, ...], indices: np.ndarray) -> Any:
        try:
            return self._collate(list(images))
        except (RuntimeError, TypeError) as error:
            kinds = sorted({str(getattr(image, "shape", type(image).__name__)) for image in images})
            raise DataError(
                f"The images of samples {indices[:4].tolist()}... cannot be stacked into one tensor; found {', '.join(kinds[:4])}. "
                "Give the dataset a transform that returns tensors of one shape, or pass collate=."
            ) from error


def _as_is(batch: Any) -> Any:
    return batch
