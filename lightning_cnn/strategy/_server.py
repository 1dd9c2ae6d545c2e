"""One shard of a parameter server: applies the workers' gradients with the user's own optimizer and answers with fresh weights."""

import copy
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cnn.functional.scaling import staleness_factor


class Shard:
    """A slice of the model, its optimizer state, and a clock for each worker.

    `staleness` bounds the clocks: a worker that is more than `staleness` updates ahead of the slowest one waits for its answer
    (stale-synchronous parallel, Ho et al. 2013). Then no update is older than `(workers - 1) * (2 * staleness + 1)` others.
    """

    def __init__(self, optimizer: Optimizer, mine: list[nn.Parameter], workers: int, staleness: int | None, scale: bool) -> None:
        self.optimizer, self.masters = own_copy(optimizer, mine)
        self.staleness, self.scale = staleness, scale
        self.version, self.applied, self.ages = 0, Counter[int](), Counter[int]()
        self.clock, self.active = dict.fromkeys(range(workers), 0), set[int]()
        self.turn = threading.Condition()

    def push(self, worker: int, gradient: Tensor, seen: int, present: list[bool], settings: list[float]) -> None:
        """Apply one gradient that was computed from version `seen`, at once."""
        with self.turn:
            self._apply(gradient, self.version - seen, present, settings)
            self.applied[worker] += 1
            self.clock[worker] += 1
            self.turn.notify_all()

    def join(self, worker: int) -> None:
        """The worker starts an epoch: from now on nobody runs away from it, and it may not hold up those who went on before."""
        with self.turn:
            self.clock[worker] = max(self.clock.values())
            self.active.add(worker)

    def answer(self, worker: int) -> tuple[Tensor, int]:
        """The weights and their version, as soon as the staleness bound lets this worker go on."""
        with self.turn:
            if (bound := self.staleness) is not None:
                self.turn.wait_for(lambda: worker not in self.active or self._lead(worker) <= bound)
            return flatten(self.masters), self.version

    def state(self) -> dict[int, Any]:
        """The optimizer's state by the position of the parameter in this shard."""
        with self.turn:
            return copy.deepcopy(self.optimizer.state_dict()["state"])

    def pause(self, worker: int) -> None:
        """The worker has nothing to push for now, or is dead: nobody waits for it."""
        with self.turn:
            self.active.discard(worker)
            self.turn.notify_all()

    def _lead(self, worker: int) -> int:
        return self.clock[worker] - min(self.clock[other] for other in self.active)

    def _apply(self, gradient: Tensor, age: int, present: list[bool], settings: list[float]) -> None:
        self.ages[age] += 1
        adopt(self.optimizer, settings)
        for master, part, there in zip(self.masters, parts(gradient, self.masters), present, strict=True):
            master.grad = part.to(master.dtype) if there else None  # a frozen or unused parameter must not even decay
        factor = staleness_factor(age) if self.scale else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        self.optimizer.step()
        self.version += 1


def own_copy(optimizer: Optimizer, mine: list[nn.Parameter]) -> tuple[Optimizer, list[nn.Parameter]]:
    """The same optimizer, state included, over CPU copies of the parameters in `mine` only."""
    chosen = {id(p) for p in mine}
    slim = copy.copy(optimizer)
    slim.param_groups = [{**group, "params": [p for p in group["params"] if id(p) in chosen]} for group in optimizer.param_groups]
    slim.state = defaultdict(dict, {p: s for p, s in optimizer.state.items() if id(p) in chosen})
    memo: dict[int, Any] = {}
    own = copy.deepcopy(slim, memo)
    masters = [memo[id(p)] for p in mine]
    for master in masters:
        master.data, master.grad = master.data.cpu(), None
        own.state[master] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in own.state[master].items()}
    return own, masters


def settings_of(optimizer: Optimizer) -> list[float]:
    """What a scheduler may change: learning rate, momentum, weight decay and so on, of each group."""
    return [float(group[key]) for group in optimizer.param_groups for key in _scheduled(group)]


def adopt(optimizer: Optimizer, settings: list[float]) -> None:
    values = iter(settings)
    for group in optimizer.param_groups:
        for key in _scheduled(group):
            group[key] = next(values)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def parts(flat: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """`flat` cut and shaped like the tensors it was flattened from."""
    start = 0
    for tensor in like:
        yield flat[start : start + tensor.numel()].view_as(tensor)
        start += tensor.numel()


def shares(sizes: Sequence[int], servers: int) -> list[slice]:
    """Cut a list of parameter sizes into `servers` runs of about equal weight, none empty.

    >>> shares([4, 1, 1, 2], 2)
    [slice(0, 1, None), slice(1, 4, None)]
    """
    cuts, total, so_far = [0], sum(sizes), 0
    for index, size in enumerate(sizes):
        left = servers - len(cuts)
        if left and index > cuts[-1] and (so_far + size / 2 >= total * len(cuts) / servers or len(sizes) - index <= left):
            cuts.append(index)
        so_far += size
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]


def _scheduled(group: dict[str, Any]) -> list[str]:
    return [key for key in ("lr", "momentum", "weight_decay") if isinstance(group.get(key), float | int | Tensor)]
