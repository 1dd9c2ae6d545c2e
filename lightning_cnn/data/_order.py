"""Which samples a rank delivers, in which order, and how far it has come: the part of a loader that has no pictures in it.

The order of an epoch is a function of (seed, epoch). A global batch is `batch_size * num_replicas` neighbours of that order, and each
rank takes one contiguous part, so the ranks' batches laid end to end are the batch that one process would take.

Tails. `drop_last=False` delivers every sample exactly once, on any number of ranks, with as many batches on each: the last global
batch is split as evenly as it can be, and a tail of fewer than two samples a rank joins the batch before it (no rank is left without
a batch, and batch normalisation never meets a single sample). `drop_last=True` delivers full batches only; another
remainder is left out in each shuffled epoch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from lightning_cnn.errors import CheckpointError, ConfigurationError, raise_all
from lightning_cnn.functional import counter

Draw = Callable[[int], np.ndarray]  # from the key of an epoch to its sample indices


@dataclass
class Order:
    """The order of `samples` samples, this rank's share of it, and the position in it: the epoch and the batches delivered since.

    `fingerprint` says which samples they are, where that is known.

    `batch` goes on counting when an epoch is over; so the state after an epoch's last batch already names the next epoch, and a
    loader that a `CombinedLoader` cycles several times inside one epoch resumes where it was.
    """

    samples: int
    batch_size: int
    seed: int = 0
    drop_last: bool = False
    draw: Draw | None = None
    num_replicas: int | None = None
    rank: int | None = None
    fingerprint: int = 0
    epoch: int = 0
    batch: int = 0

    def __post_init__(self) -> None:
        self._loaded: dict[str, int] = {}
        raise_all(self._problems())

    def _problems(self) -> list[str]:
        problems = []
        if self.batch_size < 1:
            problems.append(f"batch_size must be at least 1, got {self.batch_size}.")
        if self.samples < 1:
            problems.append("The dataset is empty: there is nothing to deliver.")
        if (self.num_replicas is None) != (self.rank is None):
            problems.append("Give both num_replicas and rank, or neither (then torch.distributed is asked).")
        return problems

    def place(self) -> tuple[int, int]:
        """(rank, number of ranks): as given, else as torch.distributed says, else a single process."""
        if self.rank is not None and self.num_replicas is not None:
            return self.rank, self.num_replicas
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        _, ranks = self.place()
        full, tail = divmod(self.samples, self.batch_size * ranks)
        length = full + (not self.drop_last and tail >= min(2, self.batch_size) * ranks)
        if length == 0 and (self.drop_last or self.samples < ranks):
            raise ConfigurationError(
                f"{self.samples} samples make no batch of {self.batch_size} on each of {ranks} ranks. "
                "Lower batch_size, use fewer ranks, or set drop_last=False."
            )
        return max(length, 1)

    def start(self) -> tuple[int, list[np.ndarray]]:
        """The epoch to deliver now and what is left of it: this rank's sample indices, batch by batch.

        A new pass starts unless a loaded state says that one was interrupted.
        """
        length = len(self)
        if not self._loaded:
            self.batch = -(-self.batch // length) * length
        elif self.batch % length:
            self._refuse_another_order()
        self._loaded = {}
        epoch, first = self.epoch + self.batch // length, self.batch % length
        indices = self.indices(epoch)
        return epoch, [self._share(indices, step, length) for step in range(first, length)]

    def indices(self, epoch: int) -> np.ndarray:
        """The order of all ranks' samples in `epoch`."""
        return np.arange(self.samples) if self.draw is None else self.draw(counter.key(self.seed, "order", epoch))

    def set_epoch(self, epoch: int) -> None:
        """The trainer's word for the epoch that comes next; an interrupted one is continued if it is the same."""
        if not self._loaded or epoch != self.epoch:
            self.epoch, self.batch, self._loaded = epoch, 0, {}

    def state_dict(self) -> dict[str, int]:
        """Two integers that say where we are, and the four they depend on, which `start` compares."""
        return {"epoch": self.epoch, "batch": self.batch, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch, self._loaded = state["epoch"], state["batch"], dict(state)

    def _identity(self) -> dict[str, int]:
        batch = self.batch_size * self.place()[1]
        return {"seed": self.seed, "samples": self.samples, "global_batch": batch, "fingerprint": self.fingerprint}

    def _refuse_another_order(self) -> None:
        now, then = self._identity(), self._loaded
        changed = [f"{name} was {then[name]} and is {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
        if changed:
            raise CheckpointError(
                f"The checkpoint stopped inside epoch {self.epoch} of another order ({', '.join(changed)}): going on would "
                "repeat some samples and skip others. Resume with the same values, or from a checkpoint at the end of an epoch."
            )

    def _share(self, indices: np.ndarray, step: int, length: int) -> np.ndarray:
        rank, ranks = self.place()
        size = self.batch_size * ranks
        ragged_end = step == length - 1 and not self.drop_last
        part = indices[step * size : None if ragged_end else (step + 1) * size]
        return np.array_split(part, ranks)[rank]


def shuffled(samples: int) -> Draw:
    """Every sample once, in an order that depends on the key alone."""
    return lambda key: counter.permutation(key, samples).numpy()


def windowed(lengths: Sequence[int], window: int) -> Draw:
    """Every sample once: shards of these lengths in random order, and samples shuffled among `window` neighbours of that order."""
    starts = [0, *np.cumsum(lengths).tolist()]

    def draw(key: int) -> np.ndarray:
        shards = counter.permutation(counter.key(key, "shards"), len(lengths)).tolist()
        groups = [shards[first : first + window] for first in range(0, len(shards), window)]
        samples = [np.concatenate([np.arange(starts[k], starts[k + 1]) for k in group]) for group in groups]
        shuffles = (counter.permutation(counter.key(key, "window", k), len(part)).numpy() for k, part in enumerate(samples))
        return np.concatenate([part[shuffle] for part, shuffle in zip(samples, shuffles, strict=True)])

    return draw


def shards_at_once(lengths: Sequence[int], window: int, batch: int) -> int:
    """Between the first and the last use of how many shards a batch may lie, if samples are shuffled among `window` shards.

    A batch is `batch` neighbours of the order at most: all of it lies in one group of `window` shards, or in several beside each other.
    """
    smallest_group = sum(sorted(lengths)[:window])
    return min(len(lengths), window * (1 + -(-(batch - 1) // smallest_group)))


def balanced(labels: np.ndarray) -> Draw:
    """As many draws as samples, every class equally often (to within one draw); see `weighted`."""
    _, position, count = np.unique(labels, return_inverse=True, return_counts=True)
    return weighted(1 / count[position], groups=position)


def weighted(weights: np.ndarray, groups: np.ndarray | None = None) -> Draw:
    """As many draws as samples, each sample in proportion to its weight, to within one draw for every group.

    Systematic sampling: one point in each of n equal slices of the cumulated weights. The k-th repetition of sample i in an epoch is
    drawn as i + k * n, so that it has noise of its own.
    """
    n = len(weights)

    def draw(key: int) -> np.ndarray:
        arranged = counter.permutation(key, n).numpy()
        if groups is not None:
            arranged = arranged[np.argsort(groups[arranged], kind="stable")]
        edges = np.cumsum(np.asarray(weights, np.float64)[arranged])
        points = (np.arange(n) + counter.uniform(key, torch.arange(n)).numpy()) / n
        chosen = np.sort(arranged[np.minimum(np.searchsorted(edges / edges[-1], points, side="right"), n - 1)])
        repetition = np.arange(n) - np.searchsorted(chosen, chosen)
        return (chosen + repetition * n)[counter.permutation(counter.key(key, "shuffle"), n).numpy()]

    return draw


def within(subset: np.ndarray, draw: Draw | None, total: int) -> Draw:
    """The order of a draw over `len(subset)` samples, as samples of the dataset of `total` that the subset is part of."""

    def chosen(key: int) -> np.ndarray:
        drawn = np.arange(len(subset)) if draw is None else draw(key)
        return subset[drawn % len(subset)] + drawn // len(subset) * total

    return chosen
