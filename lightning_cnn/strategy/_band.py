"""A picture of which this device holds a part, as a tensor that any model may be given.

`Band` says the size of the whole picture and computes on its part. Convolutions, pooling, padding and normalisation know what they need
from the neighbours; arithmetic on single pixels needs nothing; before anything else the picture is put together on every device and the
rest runs on ordinary tensors. So the result is exact whatever the model does, and only memory depends on what it does.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from lightning_cnn.errors import UnsupportedLayerError
from lightning_cnn.functional.spatial import Interval, adaptive_weights, divisors, hull, output_size, padded_sources, reach
from lightning_cnn.strategy._grid import Grid, Rectangle, add, exchange, gather, normalise, share

# fmt: off
POINTWISE = frozenset([
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "elu", "celu", "selu", "leaky_relu", "prelu",
    "sigmoid", "tanh", "softplus", "softsign", "mish", "threshold", "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul",
    "imul", "div", "truediv", "rtruediv", "itruediv", "pow", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "square", "clamp",
    "clip", "minimum", "maximum", "gt", "lt", "ge", "le", "eq", "ne", "clone", "contiguous", "detach", "to", "float", "double",
    "half", "bfloat16", "type", "type_as", "requires_grad", "zeros_like", "ones_like", "empty_like", "local_response_norm",
    "dropout2d", "feature_dropout", "alpha_dropout2d", "log_sigmoid",
])
# fmt: on
ABOUT = frozenset(
    ["dtype", "device", "requires_grad", "grad_fn", "is_leaf", "layout", "is_cuda", "is_meta", "ndim", "dim", "is_floating_point"]
)
ABOUT |= {"is_complex", "get_device", "is_quantized", "is_sparse", "is_mps", "is_xpu", "is_nested", "is_inference", "is_mkldnn"}


class Band(Tensor):
    """Pictures (b c h w) of which this device holds `part`; a shell without storage, so that nothing can be read past the rules."""

    part: Tensor
    grid: Grid
    extent: tuple[int, int]  # height and width of the whole picture

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            name = _name(func)
            band = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Band))
            if name in ABOUT or name.endswith("__set__"):
                return func(*tree_map(_part, args), **tree_map(_part, kwargs))
            plain = name.strip("_")
            if plain in POINTWISE:
                return _pointwise(func, band, args, kwargs)
            rule = RULES.get(plain)
            result = rule(*args, **kwargs) if rule else NotImplemented
            if result is not NotImplemented:
                return result
            if (name.endswith("_") and not name.startswith("__")) or name in ("__setitem__", "__iand__", "__ior__"):
                raise UnsupportedLayerError(
                    f"{name} changes a picture in place, which cannot be done on one that is divided among devices. Use the form that "
                    "returns a new tensor."
                )
            band.grid.gathered.add(name)
            return func(*tree_map(whole, args), **tree_map(whole, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UnsupportedLayerError(
            f"{func} reached a picture that is divided among devices; call it through torch's public functions."
        )


def divide(picture: Tensor, grid: Grid) -> Tensor:
    """This device's part of pictures that every device has; too small ones stay as they are."""
    extent = (picture.shape[2], picture.shape[3])
    if not grid.fits(extent):
        return picture
    own = grid.own(extent)
    return wrap(picture[..., slice(*own.rows), slice(*own.columns)].clone(), grid, extent)


def wrap(part: Tensor, grid: Grid, extent: tuple[int, int]) -> Band:
    shape = (*part.shape[:2], *extent)
    band: Any = Tensor._make_wrapper_subclass(Band, shape, dtype=part.dtype, device=part.device)  # type: ignore[attr-defined]
    band.part, band.grid, band.extent = part, grid, extent
    return band


def whole(value: Any) -> Any:
    """The ordinary tensor, equal on every device, that a band is a part of; anything else unchanged."""
    return gather(value.part, value.grid, value.extent) if isinstance(value, Band) else value


def _part(value: Any) -> Any:
    return value.part if isinstance(value, Band) else value


def _name(func: Callable) -> str:
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def _pointwise(func: Callable, band: Band, args: Any, kwargs: Any) -> Any:
    grid, extent = band.grid, band.extent

    def mine(value: Any) -> Any:
        if isinstance(value, Band):
            if value.extent != extent:
                raise UnsupportedLayerError(
                    f"pictures of {extent} and {value.extent} pixels are broadcast against each other; resize one"
                )
            return value.part
        return _cut(share(value, grid), grid, extent) if isinstance(value, Tensor) else value

    result = func(*tree_map(mine, args), **tree_map(mine, kwargs))
    return wrap(result, grid, extent) if isinstance(result, Tensor) else result


def _cut(tensor: Tensor, grid: Grid, extent: tuple[int, int]) -> Tensor:
    """What a common tensor that is broadcast against a picture says about this device's part."""
    own = grid.own(extent)
    if tensor.dim() >= 2 and tensor.shape[-2] == extent[0] > 1:
        tensor = tensor[..., slice(*own.rows), :]
    if tensor.dim() >= 1 and tensor.shape[-1] == extent[1] > 1:
        tensor = tensor[..., slice(*own.columns)]
    return tensor


# -- windows: convolution and pooling -------------------------------------------------------------------------------------------------


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


def _conv2d(input: Any, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Any:
    if not isinstance(input, Band):
        return NotImplemented
    windows = _Windows(input, weight.shape[2:], stride, padding, dilation)
    if not windows.fits:
        return NotImplemented
    weight, bias = share(weight, input.grid), bias if bias is None else share(bias, input.grid)

    def convolved() -> Tensor:
        return F.conv2d(windows.input(), weight, bias, _pair(stride), 0, _pair(dilation), groups)

    # The part with its surroundings is asked for again in the backward pass (which stops before the convolution itself) instead of kept:
    # it would be a second copy of every activation, and cost what dividing the picture saves.
    again = torch.is_grad_enabled()
    return windows.output(checkpoint(convolved, use_reentrant=False, preserve_rng_state=False) if again else convolved())


def _max_pool2d(
    input: Band, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, **more: Any
) -> Any:
    windows = _Windows(input, kernel_size, stride or kernel_size, padding, dilation, ceil_mode)
    if not windows.fits or more.get("return_indices"):
        return NotImplemented
    part = windows.input(fill=-torch.inf)
    return windows.output(F.max_pool2d(part, _pair(kernel_size), _pair(stride or kernel_size), 0, _pair(dilation)))


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


def _adaptive_avg_pool2d(input: Band, output_size: Any) -> Tensor:
    size = [extent if n is None else n for n, extent in zip(_pair(output_size), input.extent, strict=True)]
    return _pooled(input, (size[0], size[1]))


def _mean(input: Band, dim: Any = None, keepdim: bool = False, **more: Any) -> Any:
    if more or dim is None or sorted(d % 4 for d in (dim if isinstance(dim, Iterable) else [dim])) != [2, 3]:
        return NotImplemented
    means = _pooled(input, (1, 1))
    return means if keepdim else means.flatten(2).squeeze(2)


# -- padding and slicing --------------------------------------------------------------------------------------------------------------


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


def _getitem(x: Band, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, slice) for i in index):
        return NotImplemented
    index = (*index, *[slice(None)] * (4 - len(index)))
    rows, columns = (list(range(size))[i] for size, i in zip(x.extent, index[2:], strict=True))
    if not rows or not columns:
        return NotImplemented
    return _copied(wrap(x.part[index[:2]], x.grid, x.extent), rows, columns)


# -- channels, and normalisation ------------------------------------------------------------------------------------------------------


def _cat(tensors: Any, dim: int = 0, **more: Any) -> Any:
    if more or dim % 4 > 1 or not all(isinstance(t, Band) and t.extent == tensors[0].extent for t in tensors):
        return NotImplemented
    return wrap(torch.cat([t.part for t in tensors], dim), tensors[0].grid, tensors[0].extent)


def _split(function: Callable) -> Callable:
    def rule(x: Band, size: Any, dim: int = 0) -> Any:
        return NotImplemented if dim % 4 > 1 else tuple(wrap(p, x.grid, x.extent) for p in function(x.part, size, dim))

    return rule


def _expand(x: Band, *sizes: Any) -> Any:
    sizes = tuple(sizes[0]) if isinstance(sizes[0], Iterable) else sizes
    if len(sizes) != 4 or any(n not in (-1, extent) for n, extent in zip(sizes[2:], x.extent, strict=True)):
        return NotImplemented
    return wrap(x.part.expand(*sizes[:2], -1, -1), x.grid, x.extent)


def _size(x: Band, dim: int | None = None) -> Any:
    return x.shape if dim is None else x.shape[dim]


def _affine(x: Tensor, weight: Any, bias: Any, grid: Grid) -> Tensor:
    shape = (1, -1, 1, 1)
    x = x if weight is None else x * share(weight, grid).to(x.dtype).view(shape)
    return x if bias is None else x + share(bias, grid).to(x.dtype).view(shape)


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


def _group_norm(input: Band, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Band:
    part = input.part
    grouped = _precise(part).unflatten(1, (num_groups, -1))
    count = grouped.shape[2] * input.extent[0] * input.extent[1]
    result = normalise(grouped, (2, 3, 4), count, eps, input.grid)[0].flatten(1, 2)
    return wrap(_affine(result, weight, bias, input.grid).to(part.dtype), input.grid, input.extent)


def _instance_norm(
    input: Band, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None, *more: Any, **named: Any
) -> Any:
    if running_mean is not None or running_var is not None:
        return NotImplemented
    eps = named.get("eps", more[2] if len(more) > 2 else 1e-5)
    return _group_norm(input, input.shape[1], weight, bias, eps)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _dropout(input: Band, p: float = 0.5, training: bool = True, inplace: bool = False) -> Band:
    """Everybody draws the noise of the whole picture and uses its part, as one device would."""
    if not training or p == 0:
        return input
    noise = F.dropout(torch.ones(input.shape, dtype=input.dtype, device=input.device), p)
    return wrap(input.part * _cut(noise, input.grid, input.extent), input.grid, input.extent)


RULES: dict[str, Callable] = {
    "conv2d": _conv2d,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "mean": _mean,
    "pad": _pad,
    "getitem": _getitem,
    "cat": _cat,
    "concat": _cat,
    "split": _split(torch.split),
    "chunk": _split(torch.chunk),
    "expand": _expand,
    "shape": _size,
    "size": _size,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "dropout": _dropout,
}
