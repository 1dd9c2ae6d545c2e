"""What one replica of an elastic job reads: a function of the step that the whole job is at, so one that comes back is in step at once."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional import counter
from lightning_cnn.strategy._stealing import loads_a_plan, reloaded


class ReplicaSampler(Sampler[list[int]]):
    """Replica r of R takes the r-th of the R batches of a step. An epoch has the same number of steps for all; the tail that does not
    fill one is left out, another one in each shuffled epoch."""

    def __init__(
        self,
        *,
        order: Callable[[int], Sequence[int]],
        samples: int,
        batch_size: int,
        replica: int,
        replicas: int,
        step: Callable[[], int],
    ) -> None:
        self.order, self.batch_size, self.replica, self.replicas, self.step = order, batch_size, replica, replicas, step
        self.steps = samples // (batch_size * replicas)
        if self.steps == 0:
            raise ConfigurationError(
                f"{samples} samples make no batch of {batch_size} for each of {replicas} replicas; lower batch_size or replicas."
            )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        step = self.step()
        epoch = step // self.steps
        order = self.order(epoch)
        while step // self.steps == epoch:
            start = (step % self.steps * self.replicas + self.replica) * self.batch_size
            yield list(order[start : start + self.batch_size])
            step = max(step + 1, self.step())


class ReplicaLoader:
    """`loader` over a replica's batches; says, when an iteration begins inside an epoch, how many batches of it are over."""

    def __init__(self, loader: Any, sampler: ReplicaSampler, skip: Callable[[int], None]) -> None:
        self.loader, self.sampler, self.skip = loader, sampler, skip

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        epoch, over = divmod(self.sampler.step(), len(self))
        self.skip(over)
        if isinstance(self.loader, DataLoader):
            yield from self.loader
        else:
            for indices in self.sampler:
                yield from self.loader._load(epoch, [np.array(indices)])


def replica_loader(loader: Any, replica: int, replicas: int, step: Callable[[], int], skip: Callable[[int], None]) -> ReplicaLoader:
    """`loader` with this replica's batches; loaders of other kinds are refused."""
    place = {"replica": replica, "replicas": replicas, "step": step}
    if loads_a_plan(loader):
        given = loader.order
        sampler = ReplicaSampler(order=given.indices, samples=given.samples, batch_size=given.batch_size, **place)
        return ReplicaLoader(loader, sampler, skip)
    if not isinstance(loader, DataLoader) or type(loader.sampler) not in (RandomSampler, SequentialSampler) or not loader.batch_size:
        raise ConfigurationError(
            f"Elastic decides which replica reads which sample, and cannot do so for a {type(loader).__name__} with its own sampler; "
            "give a DataLoader with shuffle=True or False, or one of this package's loaders."
        )
    samples = len(loader.dataset)  # type: ignore[arg-type]
    shuffle = type(loader.sampler) is RandomSampler

    def order(epoch: int) -> Sequence[int]:
        return counter.permutation(counter.key(0, "order", epoch), samples).tolist() if shuffle else range(samples)

    sampler = ReplicaSampler(order=order, samples=samples, batch_size=loader.batch_size, **place)
    return ReplicaLoader(reloaded(loader, sampler), sampler, skip)
