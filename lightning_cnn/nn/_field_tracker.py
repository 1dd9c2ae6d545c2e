"""Follow what every tensor of one forward pass sees of the picture, operation by operation: any model, traceable or not.

The mode sits below modules and functions, so residuals, parallel branches, slices and functional calls are all seen. Fields are
exact for convolutions, poolings, pads, crops, strides and their sums; an operation of torch unknown here that keeps height and width
is taken to work pixel by pixel, and all others (attention, flatten, another library's kernels) to see what all their input sees, which
is an upper bound. The statistics that normalisations take over a picture are not counted as seeing it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_cnn.functional.receptive_field import Field


@dataclass(frozen=True)
class Seen:
    """The fields of a tensor's pixels, whose rows and columns are its axes `axes` (None once the picture is flattened)."""

    fields: tuple[Field, Field]
    axes: tuple[int, int] | None

    def whole(self, shape: tuple[int, ...], picture: tuple[int, int]) -> "Seen":
        if self.axes is None:
            return self
        height, width = (field.whole(shape[axis], pixels) for field, axis, pixels in zip(self.fields, self.axes, picture, strict=True))
        return Seen((height, width), None)


class FieldTracker(TorchDispatchMode):
    """Use under `torch.inference_mode()`, which keeps operations whole. `multiply_adds` counts up as they run."""

    as_written = True  # asks swapped convolutions to run in torch's way, which is the one that can be followed

    def __init__(self, picture: Tensor) -> None:
        super().__init__()
        self.picture = (picture.shape[-2], picture.shape[-1])
        self.multiply_adds = 0
        self._seen = WeakTensorKeyDictionary()
        self._seen[picture] = Seen((Field(), Field()), (picture.dim() - 2, picture.dim() - 1))

    def seen(self, tensor: Tensor) -> Seen | None:
        return self._seen.get(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf in self._seen]
        before = [(source.shape, self._seen[source]) for source in sources]
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__.rstrip("_") if func.namespace == "aten" else FOREIGN
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if results:
            self.multiply_adds += _multiply_adds(name, args, results[0])
        for result in results if before else ():
            self._seen[result] = self._after(name, args, before, result)
        return output

    def _after(self, name: str, args: tuple, before: list[tuple[Any, Seen]], result: Tensor) -> Seen:
        shape, first = before[0]
        if first.axes is not None and len(before) == 1 and name in RULES:
            after = RULES[name](first, shape, result, list(args))
            if after is not None:
                return after
        if name not in MIXES and _pixelwise(before, result):
            return Seen(_joined([one.fields for _, one in before]), first.axes)
        return Seen(_joined([_flat(one.whole(size, self.picture)) for size, one in before]), None)


def _pixelwise(before: list[tuple[Any, Seen]], result: Tensor) -> bool:
    """Whether the rows and columns of every input can be those of the result, one by one."""
    strides = {(one.axes, *(field.stride for field in one.fields)) for _, one in before}
    return len(strides) == 1 and all(_meets(one, size, result) for size, one in before)


def _joined(pairs: list[tuple[Field, Field]]) -> tuple[Field, Field]:
    (height, width), *others = pairs
    for other in others:
        height, width = height.join(other[0]), width.join(other[1])
    return height, width


def _flat(seen: Seen) -> tuple[Field, Field]:
    """Fields of a tensor without rows and columns are the same everywhere."""
    height, width = (Field(field.low, field.high, 0) for field in seen.fields)
    return height, width


def _meets(seen: Seen, shape: Any, result: Tensor) -> bool:
    """Whether the rows and columns of an input are those of the result."""
    return seen.axes is not None and len(shape) == result.dim() and all(shape[axis] == result.shape[axis] for axis in seen.axes)


def _each(seen: Seen, change: Callable[[Field, int], Field]) -> Seen:
    height, width = (change(field, place) for place, field in enumerate(seen.fields))
    return Seen((height, width), seen.axes)


def _pair(value: Any, default: int = 1) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value or [default])
    return (values[0], values[-1])


def _conv(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    """conv2d(x, weight, bias, stride, padding, dilation): padding is a number, a pair or a word."""
    stride, padding, dilation = [*a, *[None] * 6][3:6]
    kernel, stride, dilation = a[1].shape[-2:], _pair(stride), _pair(dilation)
    if padding == "same":
        padding = [dilation[i] * (kernel[i] - 1) // 2 for i in (0, 1)]
    before = _pair(None if padding == "valid" else padding, 0)
    return _each(seen, lambda f, i: f.through(kernel[i], stride[i], before[i], dilation[i]))


def _transposed(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    """conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)."""
    a = [*a, *[None] * 8]
    kernel, stride, padding, dilation = a[1].shape[-2:], _pair(a[3]), _pair(a[4], 0), _pair(a[7])
    return _each(seen, lambda f, i: f.transposed(kernel[i], stride[i], padding[i], dilation[i]))


def _pool(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    """max_pool2d(x, kernel, stride, padding, dilation)."""
    a = [*a, *[None] * 5]
    kernel, stride, padding, dilation = _pair(a[1]), _pair(a[2] or a[1]), _pair(a[3], 0), _pair(a[4])
    return _each(seen, lambda f, i: f.through(kernel[i], stride[i], padding[i], dilation[i]))


def _average(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    return _pool(seen, shape, result, a[:4])


def _adaptive(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    axes = seen.axes or (-2, -1)
    if all(result.shape[axis] == 1 for axis in axes):
        return None  # a global pooling sees what all its input sees
    return _each(seen, lambda f, i: f.resized(shape[axes[i]], result.shape[axes[i]]))


def _nearest(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    axes = seen.axes or (-2, -1)
    return _each(seen, lambda f, i: f.resized(shape[axes[i]], result.shape[axes[i]], 0))


def _smooth(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    axes = seen.axes or (-2, -1)
    return _each(seen, lambda f, i: f.resized(shape[axes[i]], result.shape[axes[i]], 1))


def _pad(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    before = [0, 0]
    for place, axis in enumerate(seen.axes or ()):
        from_last = 2 * (len(shape) - 1 - axis)
        before[place] = a[1][from_last] if from_last < len(a[1]) else 0
    return _each(seen, lambda f, i: f.through(1, 1, before[i]))


def _slice(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    axis, start, _, step = [*a[1:], *(0, None, None, None)[len(a) - 1 :]]
    axis, start, step = axis % len(shape), start or 0, step or 1
    start = max(0, start + shape[axis]) if start < 0 else start
    axes = seen.axes or ()
    return _each(seen, lambda f, i: f.through(1, step, -start) if axes[i] == axis else f)


def _permute(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    order = [axis % len(shape) for axis in a[1]]
    height, width = (order.index(axis) for axis in seen.axes or ())
    return Seen(seen.fields, (height, width))


def _transpose(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    order = list(range(len(shape)))
    one, other = a[1] % len(shape), a[2] % len(shape)
    order[one], order[other] = other, one
    return _permute(seen, shape, result, [a[0], order])


def _reshape(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    """Rows and columns stay rows and columns when as much lies before and after them."""
    row, column = seen.axes or (0, 0)
    if column != row + 1:
        return None
    for place in range(result.dim() - 1):
        same = tuple(result.shape[place : place + 2]) == tuple(shape[row : column + 1])
        if same and prod(result.shape[:place]) == prod(shape[:row]):
            return Seen(seen.fields, (place, place + 1))
    return None


def _reduce(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    """A mean or maximum over other axes than rows and columns, which it must have kept in their place."""
    over = {axis % len(shape) for axis in ([a[1]] if isinstance(a[1], int) else a[1] or range(len(shape)))} if len(a) > 1 else None
    keeps = over is not None and not over & set(seen.axes or ()) and result.dim() == len(shape)
    return seen if keeps else None


def _linear(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    return seen if seen.axes and len(shape) - 1 not in seen.axes else None


def _softmax(seen: Seen, shape: Any, result: Tensor, a: list[Any]) -> Seen | None:
    return seen if seen.axes and a[1] % len(shape) not in seen.axes else None


RULES: dict[str, Callable[[Seen, Any, Tensor, list[Any]], Seen | None]] = {
    "conv2d": _conv, "conv_transpose2d": _transposed, "max_pool2d": _pool, "avg_pool2d": _average,
    "adaptive_avg_pool2d": _adaptive, "adaptive_max_pool2d": _adaptive, "upsample_nearest2d": _nearest, "_upsample_nearest_exact2d": _nearest,
    "upsample_bilinear2d": _smooth, "pad": _pad, "slice": _slice, "permute": _permute, "transpose": _transpose, "view": _reshape,
    "reshape": _reshape, "unsqueeze": _reshape, "squeeze": _reshape, "flatten": _reshape, "mean": _reduce, "sum": _reduce, "amax": _reduce,
    "max": _reduce, "linear": _linear, "softmax": _softmax,
}  # fmt: skip
FOREIGN = "an operation of another library"
MATRIX = ("matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention", "_native_multi_head_attention")
MIXES = frozenset(
    {*RULES, *MATRIX, FOREIGN, "roll", "flip", "sort", "cumsum", "index", "gather", "grid_sampler", "fft_rfft2", "fft_fft2"}
)


def _multiply_adds(name: str, a: tuple, result: Tensor) -> int:
    if name == "conv2d":
        return result.numel() * prod(a[1].shape[1:])
    if name == "conv_transpose2d":
        return a[0].numel() * prod(a[1].shape[1:])
    if name == "linear":
        return result.numel() * a[1].shape[1]
    if name in ("matmul", "bmm", "mm"):
        return result.numel() * a[0].shape[-1]
    if name in ("addmm", "baddbmm"):
        return result.numel() * a[1].shape[-1]
    if name == "scaled_dot_product_attention":
        return a[0].numel() * a[1].shape[-2] + result.numel() * a[1].shape[-2]
    if name == "_native_multi_head_attention":
        batch, tokens, width = a[0].shape
        return batch * tokens * width * (4 * width + 2 * tokens)
    return 0
