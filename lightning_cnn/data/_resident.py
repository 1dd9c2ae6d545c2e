"""Stored pictures that live on the device: brought there once, and only where there is room for them."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_cnn.data._images import PackedImages
from lightning_cnn.data._lanes import GatherLane, PackedLoader
from lightning_cnn.data._loader import CountedLoader
from lightning_cnn.data._order import Order
from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.batch import Batch

BROUGHT = 256  # pictures at a time
GROUPS, LIMITS = Path("/sys/fs/cgroup"), (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


class Store:
    """All pictures of some files as one tensor (n h w 3) on `device`, made when it is first asked for."""

    def __init__(self, images: PackedImages, device: torch.device, threads: int) -> None:
        self._lane, self.device, self._threads = GatherLane(images), device, threads
        self.images, self.shape = images, (len(images), *self._lane.shape, 3)

    @property
    def missing_bytes(self) -> int:
        """What is still to be allocated."""
        return 0 if "pictures" in self.__dict__ else prod(self.shape)

    @property
    def batch_size(self) -> int:
        """Of the batches in which it is filled; no larger than a shard, so that a small cache of shards holds what one needs."""
        return int(min(BROUGHT, np.diff(self.images.starts).min()))

    @cached_property
    def pictures(self) -> Tensor:
        require_room([self], self.device)
        store = torch.empty(self.shape, dtype=torch.uint8, device=self.device)
        order = Order(len(self.images), self.batch_size, num_replicas=1, rank=0)
        for batch in PackedLoader(self._lane, self.images.labels, order, threads=self._threads, ahead=2, pinned=False):
            store[batch.index.to(self.device)] = batch.image.permute(0, 2, 3, 1).to(self.device)
        return store

    @cached_property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.images.labels).to(self.device)


class ResidentLoader(CountedLoader):
    """Batches of a store; only their indices travel."""

    def __init__(self, store: Store, order: Order) -> None:
        super().__init__(order)
        self._store = store

    def _load(self, epoch: int, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        pictures, labels = self._store.pictures, self._store.labels
        for indices in plan:
            index = torch.from_numpy(indices % len(labels)).to(pictures.device)
            yield Batch(pictures[index].permute(0, 3, 1, 2), labels[index], index)


def require_room(stores: Sequence[Store], device: torch.device, processes: int = 1) -> None:
    """Refuse, before anything is allocated, what `processes` on one machine cannot hold; RAM that is overdrawn ends in a kill."""
    needed, free = sum(store.missing_bytes for store in stores), free_bytes(device)
    needed *= processes if device.type == "cpu" else 1
    if free is not None and needed > free:
        raise ConfigurationError(
            f"cache='device' needs {needed:,} bytes on {device} and {free:,} are free. Leave cache out (lane='gather' reads the same "
            "pictures from the file), or pack fewer or smaller pictures."
        )


def free_bytes(device: torch.device) -> int | None:
    """What can be allocated on a device now; None where it does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available_ram() if device.type == "cpu" else None


def available_ram(meminfo: Path = Path("/proc/meminfo"), groups: Path = GROUPS) -> int | None:
    """RAM that can be had without swapping: of the machine, or of the container if that has less; Linux only."""
    found = [1024 * kilobytes for kilobytes in [_number(meminfo, "MemAvailable:")] if kilobytes is not None]
    for folder in (groups, groups / "memory"):
        for limit, used in LIMITS:
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None:
                cached = sum(_number(folder / "memory.stat", name) or 0 for name in ("active_file", "inactive_file"))
                found.append(max(most - now + cached, 0))
    return min(found, default=None)


def _number(path: Path, name: str | None = None) -> int | None:
    """The number in a file, or in its line that begins with `name`; None where there is none."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return None
    words = [line[0] if name is None else line[1] for line in lines if line and name in (None, line[0])]
    return int(words[0]) if words and words[0].isdigit() else None
