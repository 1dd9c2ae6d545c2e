"""Let any optimizer step in float32 on parameters that are stored in less.

For the length of a step the optimizer's groups hold float32 shadows; the parameters themselves are never re-typed, as assigning
`p.data` of another dtype drops the parameter's gradient accumulator and silently ends DDP's synchronisation.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
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


@contextmanager
def shadowed(optimizer: Optimizer, is_low: Callable[[Tensor], bool]) -> Iterator[Pairs]:
    """Replace the parameters that `is_low` by float32 shadows, with their gradients and states; yields (parameter, shadow)."""
    pairs: Pairs = []
    lists = [group["params"] for group in optimizer.param_groups]
    for group, whole in zip(optimizer.param_groups, lists, strict=True):
        group["params"] = [_shadow(optimizer, parameter, pairs) if is_low(parameter) else parameter for parameter in whole]
    try:
        yield pairs
    finally:
        for group, whole in zip(optimizer.param_groups, lists, strict=True):
            group["params"] = whole
        for parameter, shadow in pairs:
            _move(optimizer, shadow, parameter)


def _shadow(optimizer: Optimizer, parameter: Tensor, pairs: Pairs) -> Tensor:
    shadow = Parameter(parameter.detach().to(torch.float32, copy=True), requires_grad=parameter.requires_grad)
    if parameter.grad is not None:
        shadow.grad = parameter.grad.float()
    _move(optimizer, parameter, shadow)
    pairs.append((parameter, shadow))
    return shadow


def _move(optimizer: Optimizer, old: Tensor, new: Tensor) -> None:
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)
