"""Rounding of tensors that may be shards: an element draws the noise of its place in the whole, on any layout."""

from collections.abc import Iterator

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_cnn.functional.rounding import Format, round_nearest, round_stochastic


def write_back(
    place: Tensor, value: Tensor, target: Format, rounding: str = "stochastic", *, index: int | Tensor = 0, **noise: int | str
) -> None:
    """Round float32 `value` into `place`, without touching its type or its gradient's graph; its first element is number `index`."""
    if isinstance(place, DTensor):
        index = global_index(place)
    here, value = local(place.detach()), local(value.detach())
    if rounding == "nearest":
        here.copy_(round_nearest(value, target))
    else:
        round_stochastic(value, target, index=index, out=here, **noise)  # pyright: ignore[reportArgumentType]
    # the kernels write behind autograd's back; a graph that saved the old weights must notice
    torch.autograd.graph.increment_version(place)


def local(x: Tensor) -> Tensor:
    """This rank's part of a shard; anything else itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def as_shard(x: Tensor, like: Tensor) -> Tensor:
    """The shard of what `like` is a shard of, of which `x` is this rank's part."""
    if not isinstance(like, DTensor):
        return x
    return DTensor.from_local(x, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def global_index(whole: DTensor) -> int | Tensor:
    """The position of the local shard's first element in the whole, or of each where the shard is not one run."""
    shape, offset = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
    if tuple(shape[1:]) == tuple(whole.shape[1:]):
        return offset[0] * whole.shape[1:].numel() if shape else 0
    index = torch.zeros((), dtype=torch.int64, device=whole.device)
    for size, start, length in zip(shape, offset, whole.shape, strict=True):
        index = index[..., None] * length + torch.arange(start, start + size, device=index.device)
    return index


def problems(module: nn.Module, name: str) -> Iterator[str]:
    """Why a plugin that looks at whole tensors cannot work here."""
    strategy = getattr(getattr(module, "_trainer", None), "strategy", None)
    if isinstance(strategy, ModelParallelStrategy):
        yield (
            f"{name} looks at whole weights, and {type(strategy).__name__} divides them. Use a strategy that keeps them whole, "
            "such as SyncDDP, or StochasticRounding."
        )
