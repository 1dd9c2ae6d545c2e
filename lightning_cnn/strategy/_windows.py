"""What convolutions, pooling, padding and slices do to a divided picture: the pixels that a part needs come from whoever has them."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_cnn.functional.spatial import Interval, adaptive_weights, divisors, hull, output_size, padded_sources, reach
from lightning_cnn.strategy._band import Band, rule, wrap
from lightning_cnn.strategy._grid import Rectangle, add, exchange, share


class _Windows:
    """A window of two axes on a band: the part it needs, and the part it makes."""

    def __init__(self, x: Band, kernel: Any, stride: Any, padding: Any, dilation: Any = 1, ceil: bool = False) -> None:
        kernel, stride, dilation = _pair(kernel), _pair(stride), _pair(dilation)
        edges = _edges(padding, kernel, dilation)
        self.axes = [
            {"kernel": k, "stride": s, "before": before, "after": after, "dilation": d}
            for k, s, (before, after), d in zip(kernel, stride, edges, dilation, strict=True)
        ]
        height, width = (output_size(size, ceil=ceil, **axis) for size, axis in zip(x.extent, self.axes, strict=True))
        self.x, self.extent = x, (height, width)
        self.fits = x.grid.fits(self.extent)

    def input(self, fill: float = 0.0) -> Tensor:
        needed = [Rectangle(*map(self._reach, part, self.axes)) for part in self.x.grid.parts(self.extent)]
        return exchange(self.x.part, self.x.grid, self.x.extent, needed, fill)

    def output(self, part: Tensor) -> Band:
        return wrap(part, self.x.grid, self.extent)

    def divisors(self, padding: bool) -> Tensor:
        own = self.x.grid.own(self.extent)
        keys = ("kernel", "stride", "before", "after")
        rows, columns = (
            divisors(part, size, padding=padding, **{key: axis[key] for key in keys})
            for part, size, axis in zip(own, self.x.extent, self.axes, strict=True)
        )
        return torch.outer(rows, columns)

    @staticmethod
    def _reach(outputs: Interval, axis: dict[str, int]) -> Interval:
        return reach(outputs, **{key: axis[key] for key in ("kernel", "stride", "before", "dilation")})


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, Iterable) else (value,)
    return (values[0], values[-1])


def _edges(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int]) -> list[tuple[int, int]]:
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in _pair(0 if padding == "valid" else padding)]


@rule("conv2d")
def _conv2d(input: Any, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Any:
    if not isinstance(input, Band):
        return NotImplemented
    windows = _Windows(input, weight.shape[2:], stride, padding, dilation)
    if not windows.fits:
        return NotImplemented
    device, dtype = input.part.device.type, _autocast_dtype(input.part)
    weight = share(weight, input.grid).to(dtype)
    bias = bias if bias is None else share(bias, input.grid).to(dtype)

    def convolved() -> Tensor:
        return F.conv2d(windows.input().to(dtype), weight, bias, _pair(stride), 0, _pair(dilation), groups)

    # The part with its surroundings is asked for again in the backward pass (which stops before the convolution itself) instead of kept:
    # it would be a second copy of every activation, and cost what dividing the picture saves.
    again = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):  # on a CPU `checkpoint` does not know all types of it
        return windows.output(checkpoint(convolved, use_reentrant=False, preserve_rng_state=False) if again else convolved())


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The type that products of x are computed in."""
    cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if cast else x.dtype


@rule("max_pool2d")
def _max_pool2d(
    input: Band, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, **more: Any
) -> Any:
    windows = _Windows(input, kernel_size, stride or kernel_size, padding, dilation, ceil_mode)
    if not windows.fits or more.get("return_indices"):
        return NotImplemented
    part = windows.input(fill=-torch.inf)
    return windows.output(F.max_pool2d(part, _pair(kernel_size), _pair(stride or kernel_size), 0, _pair(dilation)))


@rule("avg_pool2d")
def _avg_pool2d(
    input: Band,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    windows = _Windows(input, kernel_size, stride or kernel_size, padding, 1, ceil_mode)
    if not windows.fits:
        return NotImplemented
    sums = F.avg_pool2d(windows.input(), _pair(kernel_size), _pair(stride or kernel_size), divisor_override=1)
    by = torch.tensor(divisor_override) if divisor_override else windows.divisors(count_include_pad)
    return windows.output(sums / by.to(sums))


def _pooled(x: Band, size: tuple[int, int]) -> Tensor:
    """Adaptive average pooling: every device's share of each mean, added up. The result is small, so everybody gets all of it."""
    own = x.grid.own(x.extent)
    rows, columns = (
        adaptive_weights(part, extent, n).to(x.device, x.dtype) for part, extent, n in zip(own, x.extent, size, strict=True)
    )
    return add(rows @ x.part @ columns.T, x.grid)


@rule("adaptive_avg_pool2d")
def _adaptive_avg_pool2d(input: Band, output_size: Any) -> Tensor:
    size = [extent if n is None else n for n, extent in zip(_pair(output_size), input.extent, strict=True)]
    return _pooled(input, (size[0], size[1]))


@rule("mean")
def _mean(input: Band, dim: Any = None, keepdim: bool = False, **more: Any) -> Any:
    if more or dim is None or sorted(d % 4 for d in (dim if isinstance(dim, Iterable) else [dim])) != [2, 3]:
        return NotImplemented
    means = _pooled(input, (1, 1))
    return means if keepdim else means.flatten(2).squeeze(2)


@rule("pad")
def _pad(input: Band, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    edges = [*pad, 0, 0, 0, 0][:4]
    if any(pad[4:]):  # channels or pictures are added
        more = wrap(F.pad(input.part, (0, 0, 0, 0, *pad[4:]), value=value), input.grid, input.extent)
        return NotImplemented if mode != "constant" else _pad(more, edges, value=value)
    height, width = input.extent[0] + edges[2] + edges[3], input.extent[1] + edges[0] + edges[1]
    if mode == "constant":
        parts = input.grid.parts((height, width)) if input.grid.fits((height, width)) else []
        needed = [
            Rectangle(*(reach(axis, kernel=1, stride=1, before=b) for axis, b in zip(p, edges[2::-2], strict=True))) for p in parts
        ]
        part = exchange(input.part, input.grid, input.extent, needed, value or 0.0) if parts else None
        return NotImplemented if part is None else wrap(part, input.grid, (height, width))
    rows = padded_sources(input.extent[0], edges[2], edges[3], mode)
    return _copied(input, rows, padded_sources(input.extent[1], edges[0], edges[1], mode))


def _copied(x: Band, rows: list[int], columns: list[int]) -> Any:
    """The picture whose row i is row rows[i] of this one, and columns likewise."""
    extent = (len(rows), len(columns))
    if not x.grid.fits(extent):
        return NotImplemented
    sources = [(rows[slice(*part.rows)], columns[slice(*part.columns)]) for part in x.grid.parts(extent)]
    needed = [Rectangle(hull(r), hull(c)) for r, c in sources]
    part, corner = exchange(x.part, x.grid, x.extent, needed), needed[x.grid.rank]
    for dim, (positions, interval) in enumerate(zip(sources[x.grid.rank], corner, strict=True), start=2):
        part = part.index_select(dim, torch.tensor(positions, device=part.device) - interval.start)
    return wrap(part, x.grid, extent)


@rule("getitem")
def _getitem(x: Band, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, slice) for i in index):
        return NotImplemented
    index = (*index, *[slice(None)] * (4 - len(index)))
    rows, columns = (list(range(size))[i] for size, i in zip(x.extent, index[2:], strict=True))
    if not rows or not columns:
        return NotImplemented
    return _copied(wrap(x.part[index[:2]], x.grid, x.extent), rows, columns)
