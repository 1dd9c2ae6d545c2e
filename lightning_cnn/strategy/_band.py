"""A picture of which this device holds a part, as a tensor that any model may be given.

`Band` says the size of the whole picture and computes on its part. Convolutions, pooling, padding and normalisation know what they need
from the neighbours; arithmetic on single pixels needs nothing; before anything else the picture is put together on every device and the
rest runs on ordinary tensors. So the result is exact whatever the model does, and only memory depends on what it does.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_cnn.errors import UnsupportedLayerError
from lightning_cnn.strategy._grid import Grid, gather, share

Rule = TypeVar("Rule", bound=Callable)
RULES: dict[str, Callable] = {}  # `_windows` and `_channels` fill it

# fmt: off
POINTWISE = frozenset([
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "elu", "celu", "selu", "leaky_relu", "prelu",
    "sigmoid", "tanh", "softplus", "softsign", "mish", "threshold", "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul",
    "imul", "div", "truediv", "rtruediv", "itruediv", "pow", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "square", "clamp",
    "clip", "minimum", "maximum", "gt", "lt", "ge", "le", "eq", "ne", "clone", "contiguous", "detach", "to", "float", "double",
    "half", "bfloat16", "type", "type_as", "requires_grad", "zeros_like", "ones_like", "empty_like", "local_response_norm",
    "dropout2d", "feature_dropout", "alpha_dropout2d", "log_sigmoid",
])
ABOUT = frozenset([
    "dtype", "device", "requires_grad", "grad_fn", "is_leaf", "layout", "is_cuda", "is_meta", "ndim", "dim", "is_floating_point",
    "is_complex", "get_device", "is_quantized", "is_sparse", "is_mps", "is_xpu", "is_nested", "is_inference", "is_mkldnn", "__len__",
])
# fmt: on


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
            result = RULES[plain](*args, **kwargs) if plain in RULES else NotImplemented
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


def rule(*names: str) -> Callable[[Rule], Rule]:
    """The decorated function does to a band what torch's functions of these names do; NotImplemented: not to this one."""

    def known(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return known


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
        return cut(share(value, grid), grid, extent) if isinstance(value, Tensor) else value

    result = func(*tree_map(mine, args), **tree_map(mine, kwargs))
    return wrap(result, grid, extent) if isinstance(result, Tensor) else result


def cut(tensor: Tensor, grid: Grid, extent: tuple[int, int]) -> Tensor:
    """What a common tensor that is broadcast against a picture says about this device's part."""
    own = grid.own(extent)
    if tensor.dim() >= 2 and tensor.shape[-2] == extent[0] > 1:
        tensor = tensor[..., slice(*own.rows), :]
    if tensor.dim() >= 1 and tensor.shape[-1] == extent[1] > 1:
        tensor = tensor[..., slice(*own.columns)]
    return tensor
