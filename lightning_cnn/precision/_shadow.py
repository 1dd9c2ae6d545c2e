"""Let any optimizer step in float32 on parameters that are stored in less.

For the length of a step the optimizer's groups hold float32 shadows; the parameters themselves are never re-typed, as assigning
`p.data` of another dtype drops the parameter's gradient accumulator and silently ends DDP's synchronisation.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

Pairs = list[tuple[Tensor, Tensor]]


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


def buckets(optimizer: Optimizer, bucket_mib: float) -> list[list[Tensor]]:
    """The parameters that have a gradient, in runs whose float32 shadows take at most `bucket_mib` (or one parameter)."""
    limit = bucket_mib * 2**20 / 4 if splits(optimizer) else math.inf
    runs: list[list[Tensor]] = [[]]
    size = 0
    for parameter in parameters(optimizer):
        if parameter.grad is None:
            continue
        if runs[-1] and size + parameter.numel() > limit:
            runs.append([])
            size = 0
        runs[-1].append(parameter)
        size += parameter.numel()
    return runs


@contextmanager
def only(optimizer: Optimizer, chosen: Iterable[Tensor]) -> Iterator[None]:
    """Narrow the optimizer to the chosen parameters."""
    wanted = {id(parameter) for parameter in chosen}
    groups, lists = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    for group, whole in zip(groups, lists, strict=True):
        group["params"] = [parameter for parameter in whole if id(parameter) in wanted]
    optimizer.param_groups = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        optimizer.param_groups = groups
        for group, whole in zip(groups, lists, strict=True):
            group["params"] = whole


class Workspace:
    """Float32 memory for the shadows of one bucket, kept from step to step: fresh pages cost more than the arithmetic on a CPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._used = 0

    def reserve(self, numbers: int) -> None:
        self._used = 0
        if self._memory.numel() < numbers:
            self._memory = torch.empty(numbers)

    def widen(self, x: Tensor) -> Tensor:
        """A contiguous float32 copy; where the device has a caching allocator, from that."""
        if isinstance(x, DTensor) or x.device.type != "cpu" or x.layout != torch.strided:
            return x.to(torch.float32, copy=True).contiguous()
        start, self._used = self._used, self._used + x.numel()
        return self._memory[start : self._used].view(x.shape).copy_(x)


@contextmanager
def shadowed(optimizer: Optimizer, is_low: Callable[[Tensor], bool], workspace: Workspace) -> Iterator[Pairs]:
    """Replace the parameters that `is_low` by float32 shadows, with their gradients and states; yields (parameter, shadow)."""
    pairs: Pairs = []
    workspace.reserve(2 * sum(parameter.numel() for parameter in parameters(optimizer) if is_low(parameter)))
    lists = [group["params"] for group in optimizer.param_groups]
    for group, whole in zip(optimizer.param_groups, lists, strict=True):
        group["params"] = [_shadow(optimizer, parameter, pairs, workspace) if is_low(parameter) else parameter for parameter in whole]
    try:
        yield pairs
    finally:
        for group, whole in zip(optimizer.param_groups, lists, strict=True):
            group["params"] = whole
        for parameter, shadow in pairs:
            _move(optimizer, shadow, parameter)


def _shadow(optimizer: Optimizer, parameter: Tensor, pairs: Pairs, workspace: Workspace) -> Tensor:
    shadow = Parameter(workspace.widen(parameter.detach()), requires_grad=parameter.requires_grad)
    if parameter.grad is not None:
        shadow.grad = workspace.widen(parameter.grad)
    _move(optimizer, parameter, shadow)
    pairs.append((parameter, shadow))
    return shadow


def _move(optimizer: Optimizer, old: Tensor, new: Tensor) -> None:
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)
