"""A grid of devices that share each picture, and the four ways in which their tensors meet; every one knows its gradient.

The loss is the same number on every device. A tensor is either divided (each device has its own part and that part's whole gradient)
or common (every device has all of it, and the same gradient). What crosses from one to the other decides what is summed and when.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_cnn.functional.spatial import Interval, split


class Rectangle(NamedTuple):
    rows: Interval
    columns: Interval

    def overlap(self, other: "Rectangle") -> "Rectangle":
        return Rectangle(self.rows.overlap(other.rows), self.columns.overlap(other.columns))

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.size, self.columns.size

    @property
    def empty(self) -> bool:
        return 0 in self.shape

    def of(self, tensor: Tensor, place: "Rectangle") -> Tensor:
        """The view of this rectangle in a tensor that holds `place`."""
        return tensor[..., self.rows.within(place.rows), self.columns.within(place.columns)]


@dataclass(frozen=True, eq=False)
class Grid:
    """`height` times `width` devices, row by row; this one is number `rank` of `group`."""

    height: int
    width: int
    rank: int
    group: Any = None
    gathered: set[str] = field(default_factory=set)  # operations before which pictures were put together

    def fits(self, extent: tuple[int, int]) -> bool:
        return extent[0] >= self.height and extent[1] >= self.width

    def parts(self, extent: tuple[int, int]) -> list[Rectangle]:
        """What each device owns of a picture of this size: a function of the size alone, so equal sizes are always divided alike."""
        return [Rectangle(rows, columns) for rows in split(extent[0], self.height) for columns in split(extent[1], self.width)]

    def own(self, extent: tuple[int, int]) -> Rectangle:
        return self.parts(extent)[self.rank]

    def total(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def _swap(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> None:
        make = partial(dist.P2POp, group=self.group)
        operations = [make(dist.isend, tensor, group_peer=peer) for peer, tensor in outgoing.items()]
        operations += [make(dist.irecv, tensor, group_peer=peer) for peer, tensor in incoming.items()]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()


class _Exchange(torch.autograd.Function):
    """Divided -> divided: from what each owns to what each needs. Backward, what others made of my part comes home and is added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, owned: list[Rectangle], needed: list[Rectangle], fill: float) -> Tensor:
        ctx.grid, ctx.owned, ctx.needed = grid, owned, needed
        give, take = _pieces(grid, owned, needed)
        result = x.new_full((*x.shape[:2], *needed[grid.rank].shape), fill)
        for peer, tensor in _moved(grid, x, owned[grid.rank], give, take).items():
            take[peer].of(result, needed[grid.rank]).copy_(tensor)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient, grid, owned, needed = gradients[0], ctx.grid, ctx.owned, ctx.needed
        give, take = _pieces(grid, owned, needed)
        result = gradient.new_zeros((*gradient.shape[:2], *owned[grid.rank].shape))
        for peer, tensor in _moved(grid, gradient, needed[grid.rank], take, give).items():
            give[peer].of(result, owned[grid.rank]).add_(tensor)
        return result, None, None, None, None


def _pieces(grid: Grid, owned: list[Rectangle], needed: list[Rectangle]) -> tuple[list[Rectangle], list[Rectangle]]:
    """What this device gives to each (of its own), and what it takes from each."""
    have, want = owned[grid.rank], needed[grid.rank]
    return [have.overlap(each) for each in needed], [each.overlap(want) for each in owned]


def _moved(grid: Grid, x: Tensor, held: Rectangle, give: list[Rectangle], take: list[Rectangle]) -> dict[int, Tensor]:
    """The pieces `take` of each peer, where this device holds `held` of `x` and sends the pieces `give`; its own among them."""
    outgoing = {peer: piece.of(x, held).contiguous() for peer, piece in enumerate(give) if peer != grid.rank and not piece.empty}
    incoming = {
        peer: x.new_empty((*x.shape[:2], *piece.shape)) for peer, piece in enumerate(take) if peer != grid.rank and not piece.empty
    }
    grid._swap(outgoing, incoming)
    own = {} if give[grid.rank].empty else {grid.rank: give[grid.rank].of(x, held)}
    return own | incoming


def exchange(x: Tensor, grid: Grid, extent: tuple[int, int], needed: list[Rectangle], fill: float = 0.0) -> Tensor:
    """The part of the picture that this device needs, of `needed` for each; what lies outside the picture is `fill`."""
    owned = grid.parts(extent)
    return x if needed == owned else _Exchange.apply(x, grid, owned, needed, fill)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, extent: tuple[int, int]) -> Tensor:
        ctx.grid, ctx.extent = grid, extent
        whole = Rectangle(Interval(0, extent[0]), Interval(0, extent[1]))
        parts = grid.parts(extent)
        return _Exchange.forward(ctx, x, grid, parts, [whole] * len(parts), 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        own = ctx.grid.own(ctx.extent)
        return gradients[0][..., slice(*own.rows), slice(*own.columns)].contiguous(), None, None


def gather(x: Tensor, grid: Grid, extent: tuple[int, int]) -> Tensor:
    """Divided -> common: the whole picture on every device. Backward, each keeps its part of a gradient that all have."""
    return _Gather.apply(x, grid, extent)  # type: ignore[no-any-return]


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.grid.total(gradients[0]), None


def share(x: Tensor, grid: Grid) -> Tensor:
    """Common -> divided: a weight used on every part. Backward, the parts' gradients are added up."""
    return _Share.apply(x, grid) if x.requires_grad else x  # type: ignore[no-any-return]


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        return grid.total(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def add(x: Tensor, grid: Grid) -> Tensor:
    """Divided -> common: the sum of what each device found in its part. Backward, everybody has its gradient already."""
    return _Add.apply(x, grid)  # type: ignore[no-any-return]


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) over `dims` of the whole picture; returns mean and variance too, without gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], count: int, eps: float, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        mean = grid.total(x.sum(dims, keepdim=True)) / count
        centred = x - mean
        variance = grid.total(centred.square().sum(dims, keepdim=True)) / count
        scale = (variance + eps).rsqrt()
        result = centred.mul_(scale)
        ctx.save_for_backward(result, scale)
        ctx.dims, ctx.count, ctx.grid = dims, count, grid
        ctx.mark_non_differentiable(mean, variance)
        return result, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient, (result, scale) = gradients[0], ctx.saved_tensors
        sums = torch.stack([gradient.sum(ctx.dims, keepdim=True), (gradient * result).sum(ctx.dims, keepdim=True)])
        first, second = ctx.grid.total(sums) / ctx.count
        return (gradient - first - result * second) * scale, None, None, None, None


def normalise(x: Tensor, dims: tuple[int, ...], count: int, eps: float, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    return _Normalise.apply(x, dims, count, eps, grid)  # type: ignore[no-any-return]
