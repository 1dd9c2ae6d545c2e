"""What operations on channels, normalisation and dropout do to a divided picture: statistics are everybody's, noise the whole picture's."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_cnn.strategy._band import Band, cut, rule, wrap
from lightning_cnn.strategy._grid import Grid, normalise, share


@rule("cat", "concat")
def _cat(tensors: Any, dim: int = 0, **more: Any) -> Any:
    if more or dim % 4 > 1 or not all(isinstance(t, Band) and t.extent == tensors[0].extent for t in tensors):
        return NotImplemented
    return wrap(torch.cat([t.part for t in tensors], dim), tensors[0].grid, tensors[0].extent)


@rule("split")
def _split(x: Band, size: Any, dim: int = 0, by: Callable = torch.split) -> Any:
    return NotImplemented if dim % 4 > 1 else tuple(wrap(p, x.grid, x.extent) for p in by(x.part, size, dim))


@rule("chunk")
def _chunk(x: Band, chunks: int, dim: int = 0) -> Any:
    return _split(x, chunks, dim, by=torch.chunk)


@rule("expand")
def _expand(x: Band, *sizes: Any) -> Any:
    sizes = tuple(sizes[0]) if isinstance(sizes[0], Iterable) else sizes
    if len(sizes) != 4 or any(n not in (-1, extent) for n, extent in zip(sizes[2:], x.extent, strict=True)):
        return NotImplemented
    return wrap(x.part.expand(*sizes[:2], -1, -1), x.grid, x.extent)


@rule("shape", "size")
def _size(x: Band, dim: int | None = None) -> Any:
    return x.shape if dim is None else x.shape[dim]


def _affine(x: Tensor, weight: Any, bias: Any, grid: Grid) -> Tensor:
    shape = (1, -1, 1, 1)
    x = x if weight is None else x * share(weight, grid).to(x.dtype).view(shape)
    return x if bias is None else x + share(bias, grid).to(x.dtype).view(shape)


@rule("batch_norm")
def _batch_norm(
    input: Band,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Band:
    grid, part = input.grid, input.part
    if not training:
        weight, bias = (value if value is None else share(value, grid) for value in (weight, bias))
        return wrap(F.batch_norm(part, running_mean, running_var, weight, bias, False, momentum, eps), grid, input.extent)
    count = input.shape[0] * input.extent[0] * input.extent[1]
    result, mean, variance = normalise(_precise(part), (0, 2, 3), count, eps, grid)
    if running_mean is not None:
        running_mean.lerp_(mean.flatten().to(running_mean), momentum)
        running_var.lerp_((variance.flatten() * (count / max(1, count - 1))).to(running_var), momentum)
    return wrap(_affine(result, weight, bias, grid).to(part.dtype), grid, input.extent)


@rule("group_norm")
def _group_norm(input: Band, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Band:
    part = input.part
    grouped = _precise(part).unflatten(1, (num_groups, -1))
    count = grouped.shape[2] * input.extent[0] * input.extent[1]
    result = normalise(grouped, (2, 3, 4), count, eps, input.grid)[0].flatten(1, 2)
    return wrap(_affine(result, weight, bias, input.grid).to(part.dtype), input.grid, input.extent)


@rule("instance_norm")
def _instance_norm(
    input: Band, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None, *more: Any, **named: Any
) -> Any:
    if running_mean is not None or running_var is not None:
        return NotImplemented
    eps = named.get("eps", more[2] if len(more) > 2 else 1e-5)
    return _group_norm(input, input.shape[1], weight, bias, eps)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@rule("dropout")
def _dropout(input: Band, p: float = 0.5, training: bool = True, inplace: bool = False) -> Band:
    """Everybody draws the noise of the whole picture and uses its part, as one device would."""
    if not training or p == 0:
        return input
    noise = F.dropout(torch.ones(input.shape, dtype=input.dtype, device=input.device), p)
    return wrap(input.part * cut(noise, input.grid, input.extent), input.grid, input.extent)
