"""Averages of weights: of one run over time, and of several runs.

Source: Wortsman et al. 2022, "Model soups", arXiv:2203.05482, algorithm 1 (greedy); Tan & Le 2019 and TensorFlow's
`ExponentialMovingAverage` (the decay warm-up (1 + n) / (10 + n)).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_cnn.errors import ConfigurationError, raise_all


def ema_decay(updates: int, decay: float) -> float:
    """The decay after `updates` earlier updates: 0 at first (the average is the weights), then growing to `decay`.

    >>> [round(ema_decay(n, 0.999), 3) for n in (0, 1, 10, 100, 100_000)]
    [0.0, 0.182, 0.55, 0.918, 0.999]
    """
    return min(decay, (1 + updates) / (10 + updates)) if updates else 0.0


def average(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each floating tensor, summed in float64; anything else is taken from the last state."""
    raise_all(_differences(states))
    means = dict(states[-1])
    for name, tensor in states[-1].items():
        if tensor.is_floating_point():
            total = torch.stack([state[name].to(torch.float64) for state in states]).mean(0)
            means[name] = total.to(tensor.dtype)
    return means


def greedy_soup(
    states: Sequence[Mapping[str, Tensor]], score: Callable[[Mapping[str, Tensor]], float]
) -> tuple[dict[str, Tensor], list[int]]:
    """Add members best first, and keep each that does not lower the score of the average. Returns the soup and who is in it."""
    alone = [score(state) for state in states]
    order = sorted(range(len(states)), key=lambda i: -alone[i])
    chosen, best = [order[0]], alone[order[0]]
    for i in order[1:]:
        reached = score(average([states[j] for j in (*chosen, i)]))
        if reached >= best:
            chosen, best = [*chosen, i], reached
    return average([states[i] for i in chosen]), chosen


def l2_sp_gradient_(weights: Sequence[Tensor], anchors: Sequence[Tensor], alpha: float) -> None:
    """Add the gradient of alpha/2 * sum((w - w0)^2) to each weight that has a gradient."""
    for weight, anchor in zip(weights, anchors, strict=True):
        if weight.grad is not None:
            weight.grad.add_((weight.detach() - anchor).to(weight.grad.dtype), alpha=alpha)


def _differences(states: Sequence[Mapping[str, Tensor]]) -> list[str]:
    if not states:
        raise ConfigurationError("there are no members to average.")
    first = {name: tensor.shape for name, tensor in states[0].items()}
    problems = []
    for i, state in enumerate(states):
        other = {name: tensor.shape for name, tensor in state.items()}
        wrong = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if wrong:
            problems.append(f"member {i} is another architecture than member 0: {', '.join(wrong[:3])} differ")
    return problems
