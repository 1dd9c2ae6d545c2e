"""Let any optimizer step in float32 on parameters that are stored in less.

For the length of a step the optimizer's groups hold float32 shadows; the parameters themselves are never re-typed, as assigning
`p.data` of another dtype drops the parameter's gradient accumulator and silently ends DDP's synchronisation.

Optimizers that treat every element alike step through a large parameter a piece at a time, so that no shadow is larger than asked.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, optim
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

ALIGNED = 256  # elements; a piece begins at a multiple of it, as do the scales of 8-bit states
ELEMENTWISE = {
    *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.Adadelta, optim.RMSprop),
    *(optim.Rprop, optim.ASGD),
}


@dataclass(frozen=True)
class Piece:
    """A parameter, or the rows `start` to `stop` of one."""

    parameter: Tensor
    start: int = 0
    stop: int | None = None

    @property
    def is_last(self) -> bool:
        return self.stop is None or self.stop == len(self.parameter)

    @property
    def first(self) -> int:
        """The elements before it."""
        return self.start * self.parameter[0].numel() if self.start else 0

    def of(self, whole: Tensor) -> Tensor:
        """Its part of something that has the parameter's shape."""
        return whole if self.stop is None else whole[self.start : self.stop]


def parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def splits(optimizer: Optimizer) -> bool:
    """Whether stepping a part of the parameters at a time is the same step.

    True of every optimizer in torch.optim, whose state is a parameter's own. Others may share statistics between parameters
    (D-Adaptation, Prodigy) or count calls; and a user's step hook must run once a step.
    """
    own = type(optimizer).__module__.startswith("torch.optim")
    return own and not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def runs(optimizer: Optimizer, is_low: Callable[[Tensor], bool], bucket_mib: float, done: Collection[Tensor] = ()) -> list[list[Piece]]:
    """What has a gradient and is not `done`, in runs whose float32 shadows take at most `bucket_mib` (or one that cannot be cut)."""
    limit = bucket_mib * 2**20 / 4 if splits(optimizer) else math.inf
    found: list[list[Piece]] = [[]]
    size = 0
    for parameter in parameters(optimizer):
        if parameter.grad is None or parameter in done:
            continue
        cut = type(optimizer) in ELEMENTWISE and is_low(parameter) and not isinstance(parameter, DTensor)
        for piece in _cut(parameter, limit if cut else math.inf):
            numbers = piece.of(parameter).numel()
            if found[-1] and size + numbers > limit:
                found.append([])
                size = 0
            found[-1].append(piece)
            size += numbers
    return found


def _cut(parameter: Tensor, limit: float) -> list[Piece]:
    if parameter.numel() <= limit:
        return [Piece(parameter)]
    row = parameter[0].numel()
    unit = ALIGNED // math.gcd(row, ALIGNED)
    step = max(1, int(limit) // row // unit) * unit
    return [Piece(parameter, start, min(start + step, len(parameter))) for start in range(0, len(parameter), step)]


class Workspace:
    """Float32 memory for the shadows of one run, kept from step to step: fresh pages cost more than the arithmetic on a CPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._used = 0

    def reserve(self, numbers: int) -> None:
        self._used = 0
        if self._memory.numel() < numbers:
            self._memory = torch.empty(numbers)

    def shadow(self, piece: Piece) -> Parameter:
        """A float32 copy of the piece, with its gradient."""
        shadow = Parameter(self._widen(piece.of(piece.parameter.detach())), requires_grad=piece.parameter.requires_grad)
        if piece.parameter.grad is not None:
            shadow.grad = self._widen(piece.of(piece.parameter.grad))
        return shadow

    def _widen(self, x: Tensor) -> Tensor:
        """A contiguous float32 copy; where the device has a caching allocator, from that."""
        if isinstance(x, DTensor) or x.device.type != "cpu" or x.layout != torch.strided:
            return x.to(torch.float32, copy=True).contiguous()
        start, self._used = self._used, self._used + x.numel()
        return self._memory[start : self._used].view(x.shape).copy_(x)


@contextmanager
def standing_in(optimizer: Optimizer, pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Narrow the optimizer to the second of each pair, in place of the first."""
    instead: dict[int, list[Tensor]] = {}
    for parameter, shadow in pairs:
        instead.setdefault(id(parameter), []).append(shadow)
    groups, lists = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    for group, whole in zip(groups, lists, strict=True):
        group["params"] = [shadow for parameter in whole for shadow in instead.get(id(parameter), ())]
    optimizer.param_groups = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        optimizer.param_groups = groups
        for group, whole in zip(groups, lists, strict=True):
            group["params"] = whole
