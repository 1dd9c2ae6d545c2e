"""Loaders whose whole state is a position: the same batches for any number of workers, and resumed inside an epoch to the bit.

Stock shuffled loaders are not (after a resume inside an epoch some samples come twice and as many never). Here the order is a function
of (seed, epoch), the noise of a sample a function of (seed, epoch, index), and the position counts the batches that were *delivered*,
not those that workers have fetched ahead.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lightning_cnn.data._order import Order, shuffled
from lightning_cnn.errors import DataError
from lightning_cnn.functional import counter
from lightning_cnn.functional.batch import Batch
from lightning_cnn.functional.generators import generators_restored, seed_generators


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
        collate: Callable[[list[Any]], Any] = default_collate,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        samples = len(dataset)  # pyright: ignore[reportArgumentType]  # map-style datasets have a length that their type does not show
        draw = shuffled(samples) if shuffle else None
        super().__init__(Order(samples, batch_size, seed, drop_last, draw, num_replicas, rank))
        self._plan = _Plan()
        self._loader = DataLoader(
            _Batches(dataset, seed, collate),
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
        yield from self._loader


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

    def __init__(self, dataset: Any, seed: int, collate: Callable[[list[Any]], Any]) -> None:
        self._dataset, self._seed, self._collate = dataset, seed, collate

    def __getitem__(self, address: tuple[int, np.ndarray]) -> Batch:
        epoch, indices = address
        with generators_restored():
            images, labels = zip(*(self._sample(epoch, int(index)) for index in indices), strict=True)
        return Batch(self._stack(images, indices), self._collate(list(labels)), torch.from_numpy(indices))

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
