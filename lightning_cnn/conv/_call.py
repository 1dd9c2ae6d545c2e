"""One convolution to be computed, and what a way to compute it must offer.

A way is a module of this package: its name is the algorithm's name, and it has the three functions of `Algorithm`.
"""

from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from math import prod
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.conv.geometry import Geometry, Pair, output_size, span

Role = Literal["forward", "input", "weight"]
ROLES: tuple[Role, ...] = ("forward", "input", "weight")
NAMES = ("default", "depthwise", "fft", "fft_tiled", "im2col", "layout", "winograd2", "winograd4")


@dataclass(frozen=True)
class Call:
    """What a measured choice depends on; two calls that are equal get the same algorithm."""

    role: Role
    x: tuple[int, ...]  # the input's shape (b, c, h, w), in every role
    weight: tuple[int, ...]  # the filters' shape (k, c / groups, r, s), in every role
    geometry: Geometry
    dtype: torch.dtype
    device: str
    channels_last: bool  # the layout of the operands, and of the result
    threads: int
    keep: bool  # may the transformed filters be kept between calls: no gradient is being recorded

    @property
    def size(self) -> Pair:
        return self.x[2], self.x[3]

    @property
    def kernel(self) -> Pair:
        return self.weight[2], self.weight[3]

    @property
    def y(self) -> tuple[int, ...]:
        return (self.x[0], self.weight[0], *output_size(self.size, self.kernel, self.geometry))

    @property
    def depthwise(self) -> bool:
        return self.weight[1] == 1 and self.weight[0] == self.x[1] == self.geometry.groups

    @property
    def flops(self) -> int:
        return 2 * prod(self.y) * prod(self.weight[1:])

    def as_forward(self) -> "Call":
        """The forward convolution with stride one that computes this input gradient (`geometry.gradient_as_forward`)."""
        reach = span(self.kernel, self.geometry.dilation)
        padding = [reach[i] - 1 - self.geometry.padding[i] for i in (0, 1)]
        g = [size + 2 * min(extra, 0) for size, extra in zip(self.y[2:], padding, strict=True)]
        swapped = (self.x[1], self.weight[0] // self.geometry.groups, *self.kernel)
        geometry = self.geometry._replace(padding=(max(padding[0], 0), max(padding[1], 0)))
        return replace(self, role="forward", x=(self.x[0], self.weight[0], *g), weight=swapped, geometry=geometry)


class Algorithm(Protocol):
    """A way to compute a convolution and its gradients."""

    def refuses(self, call: Call) -> str:
        """Why it cannot compute `call`; empty when it can."""
        ...

    def workspace(self, call: Call) -> int:
        """Bytes needed beside the input, the filters and the result."""
        ...

    def compute(self, call: Call, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        """The result of `call`: from (x, weight, bias) forward, (g, weight) for the input's gradient, (x, g) for the weight's."""
        ...


@cache
def load(name: str) -> Algorithm:
    """The algorithm of that name."""
    if name not in NAMES:
        raise ConfigurationError(f"There is no convolution algorithm '{name}'; choose 'auto' or one of {', '.join(NAMES)}.")
    return cast(Algorithm, import_module(f"lightning_cnn.conv.{name}"))


def run(name: str, call: Call, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The result of `call` by that algorithm, in the layout of the operands."""
    result = load(name).compute(call, a, b, bias)
    return result.contiguous(memory_format=torch.channels_last if call.channels_last else torch.contiguous_format)


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias[:, None, None]


def nbytes(*shapes: tuple[int, ...], dtype: torch.dtype) -> int:
    return sum(prod(shape) for shape in shapes) * dtype.itemsize
