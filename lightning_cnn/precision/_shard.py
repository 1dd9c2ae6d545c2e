"""Rounding of parameters that may be shards: an element draws the noise of its place in the whole parameter, on any layout."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_cnn.functional.rounding import Format, round_nearest, round_stochastic
from lightning_cnn.precision._shadow import Piece


def write_back(piece: Piece, value: Tensor, target: Format, rounding: str, *, seed: int, step: int, stream: str) -> None:
    """Round float32 `value` into a piece of a parameter, in place, without touching its type or its gradient's graph."""
    parameter = piece.parameter
    sharded = isinstance(parameter, DTensor)
    place, shard = (parameter.to_local(), global_index(parameter)) if sharded else (piece.of(parameter.detach()), piece.first)
    value = value.to_local() if isinstance(value, DTensor) else value.detach()
    if rounding == "nearest":
        place.copy_(round_nearest(value, target))
    else:
        round_stochastic(value, target, seed=seed, step=step, stream=stream, index=shard, out=place)
    # the kernels write behind autograd's back; a graph that saved the old weights must notice
    torch.autograd.graph.increment_version(parameter)


def global_index(parameter: DTensor) -> int | Tensor:
    """The position of the local shard's first element in the whole parameter, or of each where the shard is not one run."""
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if tuple(shape[1:]) == tuple(parameter.shape[1:]):
        return offset[0] * parameter.shape[1:].numel() if shape else 0
    index = torch.zeros((), dtype=torch.int64, device=parameter.device)
    for size, start, whole in zip(shape, offset, parameter.shape, strict=True):
        index = index[..., None] * whole + torch.arange(start, start + size, device=index.device)
    return index
