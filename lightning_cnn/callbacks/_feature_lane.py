"""A DataLoader that says which samples each batch holds, and loads nothing for batches whose features are all stored.

Order, random draws and workers stay those of the loader it replaces.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_cnn.callbacks._feature_store import FeatureStore
from lightning_cnn.errors import DataError

OFF = -1


@dataclass
class Entry:
    """One batch on its way to its step: its samples, their features (None: to be recorded) and the rest of the batch."""

    index: Tensor
    features: Tensor | None
    rest: list[Tensor]


class Hit(list):
    """Indices whose features are stored."""


@dataclass
class Loaded:
    index: list[int]
    batch: Any

    def pin_memory(self) -> "Loaded":
        return Loaded(self.index, pin_memory(self.batch))


@dataclass
class Lane:
    """What loader, callback and step share. `view` is shared memory, so that workers see it; OFF: load everything, remember nothing."""

    store: FeatureStore
    view: Tensor = field(default_factory=lambda: torch.full((), OFF).share_memory_())
    arriving: deque[Entry] = field(default_factory=deque)
    stepping: deque[Entry] = field(default_factory=deque)
    template: Any = None

    def has(self, index: Any) -> bool:
        view = int(self.view)
        return view != OFF and bool(self.store.seen[view, torch.as_tensor(index)].all())

    def restock(self, store: FeatureStore) -> None:
        """Forget, and go on with what `store` holds; the tensors that loader workers see stay the same."""
        self.store.clear()
        self.store.columns, self.store.layout, self.store.sums, self.store.folder = (
            store.columns,
            store.layout,
            store.sums,
            store.folder,
        )
        self.store.seen.copy_(store.seen)

    def learn(self, batch: Any) -> None:
        """How an empty batch looks, where none has been loaded yet."""
        if self.template is None:
            self.template = apply_to_collection(batch, Tensor, lambda leaf: leaf[:0])

    def restart(self) -> None:
        self.arriving.clear()
        self.stepping.clear()

    def deliver(self, fetched: Any) -> Any:
        view = int(self.view)
        if isinstance(fetched, Hit):
            index = torch.tensor(list(fetched))
            features, *rest = self.store.read(view, index)
            self.arriving.append(Entry(index, features, rest))
            return _filled(self.template, len(index), rest)
        if view != OFF:
            self.template, rest = _taken_apart(fetched.batch, len(fetched.index))
            self.arriving.append(Entry(torch.tensor(fetched.index), None, rest))
        return fetched.batch


class IndexedDataset(Dataset):
    def __init__(self, dataset: Any, seen: Tensor, view: Tensor) -> None:
        self.dataset, self.seen, self.view = dataset, seen, view

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, index: list[int]) -> Hit | tuple[list[int], list[Any]]:
        view = int(self.view)
        if view != OFF and bool(self.seen[view, torch.tensor(index)].all()):
            return Hit(index)
        many = getattr(self.dataset, "__getitems__", None)
        return list(index), many(index) if many else [self.dataset[i] for i in index]


@dataclass
class Collate:
    collate: Callable[[Any], Any]

    def __call__(self, fetched: Any) -> Hit | Loaded:
        return fetched if isinstance(fetched, Hit) else Loaded(fetched[0], self.collate(fetched[1]))


class LaneLoader(DataLoader):
    """`dataset` is an IndexedDataset; Lightning may build this again with a distributed sampler, hence no arguments of its own."""

    lane: Lane

    def __iter__(self) -> Any:
        self.lane.restart()
        return _Delivering(super().__iter__(), self.lane)


class _Delivering:
    def __init__(self, fetched: Iterator[Any], lane: Lane) -> None:
        self._fetched, self._lane = fetched, lane

    def __iter__(self) -> "_Delivering":
        return self

    def __next__(self) -> Any:
        return self._lane.deliver(next(self._fetched))


class PlannedLoader:
    """The same for a loader that states its plan: `order.start()` gives (epoch, sample indices by batch), `_load` reads a plan."""

    def __init__(self, loader: Any, lane: Lane) -> None:
        self._given, self._lane, self.num_workers = loader, lane, 0

    def __len__(self) -> int:
        return len(self._given)

    def __iter__(self) -> Iterator[Any]:
        self._lane.restart()
        epoch, plan = self._given.order.start()
        stored = [self._lane.has(index) for index in plan]
        views = self._lane.store.views
        missing = [index for index, there in zip(plan, stored, strict=True) if not there]
        real = iter(self._given._load(epoch % views if views > 1 else epoch, missing))
        for index, there in zip(plan, stored, strict=True):
            self._given.order.batch += 1
            listed = index.tolist()
            yield self._lane.deliver(Hit(listed) if there else Loaded(listed, next(real)))

    @property
    def batch_sampler(self) -> Any:
        return self._given.batch_sampler

    def set_epoch(self, epoch: int) -> None:
        self._given.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        return self._given.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._given.load_state_dict(state)


def lane_loader(loader: Any, lane: Lane) -> "LaneLoader | PlannedLoader":
    if _states_its_plan(loader):
        return PlannedLoader(loader, lane)
    names = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator", "prefetch_factor")
    settings = {name: getattr(loader, name) for name in names} | {"persistent_workers": loader.persistent_workers}
    if type(loader.batch_sampler) is BatchSampler:
        settings |= {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
    else:
        settings |= {"batch_sampler": loader.batch_sampler}
    dataset = IndexedDataset(loader.dataset, lane.store.seen, lane.view)
    kind = type("LaneLoader", (LaneLoader,), {"lane": lane})
    return kind(dataset, collate_fn=Collate(loader.collate_fn), **settings)


def refusals(loader: Any) -> list[str]:
    if _states_its_plan(loader):
        return []
    if not isinstance(loader, DataLoader):
        return [f"FeatureCache needs a torch DataLoader or one of this package's, and the data come from a {type(loader).__name__}"]
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return [f"FeatureCache needs samples with an index and automatic batching; {type(loader.dataset).__name__} streams"]
    return []


def dataset_of(loader: Any) -> Any:
    """What the loader reads, as far as it can be found."""
    if _states_its_plan(loader):
        batches = getattr(getattr(loader, "_loader", None), "dataset", loader)
        return getattr(batches, "_dataset", batches)
    return loader.dataset


def samples_of(loader: Any) -> int:
    return loader.order.samples if _states_its_plan(loader) else len(loader.dataset)


def read(loader: Any, index: list[int], epoch: int) -> Any:
    """One batch of these samples, outside of any order, with the noise of `epoch` where the loader keys it so."""
    if _states_its_plan(loader):
        return next(iter(loader._load(epoch, [np.array(index)])))
    return loader.collate_fn([loader.dataset[i] for i in index])


def _states_its_plan(loader: Any) -> bool:
    return not isinstance(loader, DataLoader) and hasattr(loader, "order") and hasattr(loader, "_load")


def _taken_apart(batch: Any, count: int) -> tuple[Any, list[Tensor]]:
    """An empty batch of this structure, and every tensor but the pictures."""
    others: list[Any] = []
    apply_to_collection(batch, (str, bytes, int, float), others.append)
    leaves: list[Tensor] = []
    template = apply_to_collection(batch, Tensor, lambda leaf: (leaves.append(leaf), leaf[:0])[1])
    if others or not leaves or any(leaf.dim() == 0 or len(leaf) != count for leaf in leaves):
        raise DataError(
            f"a batch must hold only tensors with one row a sample to be kept with its features; this {type(batch).__name__} holds "
            f"{', '.join(sorted({type(other).__name__ for other in others})) or [list(leaf.shape) for leaf in leaves]}."
        )
    return template, [leaf for leaf in leaves if leaf.dim() < 4]


def _filled(template: Any, count: int, rest: list[Tensor]) -> Any:
    """A batch like any other, with one black pixel in place of each picture: its features are stored, nobody looks."""
    values = iter(rest)

    def fill(leaf: Tensor) -> Tensor:
        return next(values) if leaf.dim() < 4 else leaf.new_zeros((count, leaf.shape[1], *([1] * (leaf.dim() - 2))))

    return apply_to_collection(template, Tensor, fill)
