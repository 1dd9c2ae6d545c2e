"""Work-stealing batches: whoever is free takes the next one, so a slow worker takes fewer and nobody waits.

Every rank owns its first batch of an epoch (so that every rank has one) and claims the others from a counter in the job's store. Loaders
ask ahead (Lightning by one batch, worker processes by more), so towards the end of an epoch a slow rank would sit on batches that others
wait for: a rank takes no more where the others will be done with all that is left sooner than it with one more.

The ledger of an epoch is in the store: `next` (the counter), `done` (batch numbers, appended after training on them), `count` (how many
those are), `left` (ranks that take no more) and one key for each batch in somebody's hands. A dead worker's batches are those that are
not done and whose owner is dead, or that nobody claimed; who runs out of work takes them over, in the same epoch or at the end of the
next. Order is a function of (seed, epoch).
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from lightning_cnn.functional import counter
from lightning_cnn.strategy._team import Team


@dataclass
class _Epoch:
    """One epoch's batches by number, and where its ledger is."""

    index: int
    ledger: str
    batches: dict[int, list[int]]
    before: frozenset[int]  # batch numbers done before a resume
    mine: int = 0  # batches that this rank has finished
    ours: int = 0  # and all ranks, as far as this one knows


class StealingSampler(Sampler[list[int]]):
    """Batches of indices, each handed to exactly one living rank. Call `finished()` after training on each, in order."""

    def __init__(
        self,
        *,
        length: int,
        batch_size: int,
        team: Team,
        name: str,
        epoch: Callable[[], int],
        seed: int,
        shuffle: bool,
        drop_last: bool,
        order: Callable[[int], Any] | None = None,
    ) -> None:
        self.length, self.batch_size, self.team, self.name = length, batch_size, team, name
        self.seed, self.shuffle, self.drop_last, self._which_epoch, self._given = seed, shuffle, drop_last, epoch, order
        self._epochs: deque[_Epoch] = deque(maxlen=2)
        self._hand: deque[tuple[_Epoch, int]] = deque()
        self._visits, self._resume, self._stopped = 0, (-1, frozenset[int]()), False

    @property
    def total(self) -> int:
        """Batches of one epoch, over all ranks."""
        return self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)

    @property
    def progress(self) -> int:
        """Batches of the whole job handed out before the one in training, over all ranks and epochs."""
        epoch, number = self._hand[0] if self._hand else (self._epochs[-1], self.total)
        return epoch.index * self.total + min(number, self.total)

    def __iter__(self) -> Iterator[list[int]]:
        index, (resumed, done) = self._which_epoch(), self._resume
        before = done if resumed == index else frozenset()  # kept: Lightning may begin a resumed epoch's iteration twice
        batches = plan(self._order(index), self.batch_size, self.total, before, self.team.size)
        self._epochs.append(_Epoch(index, f"{self.name}/{self._visits}", batches, before))
        self._hand.clear()
        self._stopped = False
        if self.team.rank == 0 and self._visits >= 3:
            for key in ("next", "done", "count", "left"):
                self.team.store.delete_key(f"{self.name}/{self._visits - 3}/{key}")
        self._visits += 1
        return self._claims(self._epochs[-1])

    def finished(self) -> None:
        """The oldest batch handed out was trained on. Done is written before the claim is dropped, so nobody ever sees neither."""
        if self._hand:
            epoch, number = self._hand.popleft()
            self.team.store.append(f"{epoch.ledger}/done", f"{number},")
            self.team.store.delete_key(f"{epoch.ledger}/{number}")
            epoch.mine, epoch.ours = epoch.mine + 1, self.team.store.add(f"{epoch.ledger}/count", 1)

    def stop(self) -> None:
        """Hand out no more batches in this epoch."""
        self._stopped = True

    def state_dict(self) -> dict[str, Any]:
        if not self._epochs:
            return {"epoch": self._resume[0], "done": sorted(self._resume[1])}
        epoch = self._epochs[-1]
        return {"epoch": epoch.index, "done": sorted(epoch.before | self._done(epoch))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resume = (int(state["epoch"]), frozenset(state["done"]))
        self._epochs.clear()  # what was begun before belongs to nobody

    @property
    def epoch(self) -> int:
        """The epoch whose batches are handed out; a batch that a dead rank left in the one before has this one's noise."""
        return self._epochs[-1].index

    def _order(self, epoch: int) -> Sequence[int]:
        if self._given is not None:
            return self._given(epoch).tolist()
        if not self.shuffle:
            return range(self.length)
        return counter.permutation(counter.key(self.seed, "order", epoch), self.length).tolist()

    def _claims(self, epoch: _Epoch) -> Iterator[list[int]]:
        numbers, position = list(epoch.batches), self.team.rank
        while position < len(numbers) and not self._stopped:
            if self._claim(epoch, numbers[position], holder=""):
                yield epoch.batches[numbers[position]]
            if self._left_to_others(epoch):
                break
            position = self.team.size + self.team.store.add(f"{epoch.ledger}/next", 1) - 1
        for late in list(self._epochs) if self.team.lost and not self._stopped else []:
            for number in sorted(set(late.batches) - self._done(late)):
                key = f"{late.ledger}/{number}"
                holder = self.team.store.get(key).decode() if self.team.store.check([key]) else ""
                if (not holder or int(holder) in self.team.lost) and self._claim(late, number, holder):
                    yield late.batches[number]

    def _left_to_others(self, epoch: _Epoch) -> bool:
        """Whether this rank takes no more in this epoch. Pace is what each has finished in this and the last one; one rank stays."""
        others, held = self.team.size - 1 - len(self.team.lost), len(self._hand)
        mine = 1 + sum(e.mine for e in self._epochs)
        theirs = others + sum(e.ours - e.mine for e in self._epochs)
        if others < 1 or not sooner(len(epoch.batches) - epoch.ours - held, others, theirs / others, held + 1, mine):
            return False
        return self.team.store.add(f"{epoch.ledger}/left", 1) <= others

    def _claim(self, epoch: _Epoch, number: int, holder: str) -> bool:
        me, key = str(self.team.rank), f"{epoch.ledger}/{number}"
        if self.team.store.compare_set(key, holder, me).decode() != me:
            return False
        if self.team.lost and number in self._done(epoch):  # finished, and its claim dropped, just before ours
            self.team.store.delete_key(key)
            return False
        self._hand.append((epoch, number))
        return True

    def _done(self, epoch: _Epoch) -> set[int]:
        key = f"{epoch.ledger}/done"
        text = self.team.store.get(key).decode() if self.team.store.check([key]) else ""
        return {int(number) for number in text.split(",") if number}


class StealingLoader:
    """A DataLoader over stolen batches. It has no length, because no rank knows its share; Lightning then looks one batch ahead."""

    def __init__(self, loader: DataLoader, sampler: StealingSampler) -> None:
        self.sampler, self.loader = sampler, reloaded(loader, sampler)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


class StealingLane:
    """The same for a loader that loads any plan: `order.indices(epoch)` is its order and `_load(epoch, plan)` reads batches of it."""

    def __init__(self, lane: Any, sampler: StealingSampler) -> None:
        self.lane, self.sampler = lane, sampler

    def __iter__(self) -> Iterator[Any]:
        for indices in self.sampler:
            yield from self.lane._load(self.sampler.epoch, [np.array(indices)])

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


def loads_a_plan(loader: Any) -> bool:
    return not isinstance(loader, DataLoader) and hasattr(loader, "_load") and hasattr(getattr(loader, "order", None), "indices")


def reloaded(loader: DataLoader, sampler: Sampler[list[int]]) -> DataLoader:
    """The same DataLoader with another batch sampler."""
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {"prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers}
    return DataLoader(
        loader.dataset,
        batch_sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        **workers,
    )


def sooner(left: int, others: int, their_pace: float, mine: int, my_pace: float) -> bool:
    """Whether `others` are done with `left` batches, each at their pace, before one rank with `mine` at its own.

    >>> sooner(left=3, others=1, their_pace=3.0, mine=2, my_pace=1.0), sooner(left=9, others=1, their_pace=3.0, mine=2, my_pace=1.0)
    (True, False)
    """
    return math.ceil(left / others) / their_pace < mine / my_pace


def plan(order: Sequence[int], batch_size: int, total: int, done: frozenset[int], ranks: int) -> dict[int, list[int]]:
    """The batches still to train on, by number; cut smaller where there are fewer than ranks, so that every rank has one.

    >>> plan(range(7), batch_size=2, total=4, done=frozenset([0]), ranks=2)
    {1: [2, 3], 2: [4, 5], 3: [6]}
    >>> plan(range(7), batch_size=4, total=2, done=frozenset(), ranks=3)
    {0: [0, 1, 2], 1: [3, 4], 2: [5, 6]}
    """
    batches = {n: list(order[n * batch_size : (n + 1) * batch_size]) for n in range(total) if n not in done}
    if not batches or len(batches) >= ranks:
        return batches
    samples = [sample for batch in batches.values() for sample in batch]
    samples += samples[-1:] * (ranks - len(samples))
    names = [*batches, *range(total, total + ranks - len(batches))]
    sizes = [len(samples) // ranks + (i < len(samples) % ranks) for i in range(ranks)]
    starts = [sum(sizes[:i]) for i in range(ranks)]
    return {name: samples[start : start + size] for name, start, size in zip(names, starts, sizes, strict=True)}
