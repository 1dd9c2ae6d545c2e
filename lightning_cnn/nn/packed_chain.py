"""A module of nothing but packed convolutions and residual additions, run in one go.

Python's way from one packed layer to the next takes a good part of what a layer of a small picture computes for. A chain knows its
layers beforehand: it calls their kernels one after the other, keeps what lies between in one allocation, and leaves each addition to
the layer that writes its later operand, so that it is neither a call nor another pass over memory.
"""

import operator
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from lightning_cnn.kernels import xnor
from lightning_cnn.kernels.bits import LAST, WORDS, Geometry
from lightning_cnn.nn.packed import PackedConv2d, unobserved

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
IN_PLACE = (operator.iadd, "add_")
LINE = 64


class Step(NamedTuple):
    """A layer; value 0 is the chain's input, value i + 1 the result of step i, and `plus` the value added to this step's own."""

    layer: str
    geometry: Geometry
    filters: int
    to_words: bool
    source: int
    plus: int | None = None

    def result(self, size: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Size (n, h, w) and bytes of the result for a source of `size`."""
        n, h, w = size[0], *self.geometry.output_size(*size[1:])
        return (n, h, w), n * h * w * (-(-self.filters // 64) * 8 if self.to_words else self.filters * 4)


class PackedChain(nn.Module):
    """The first base of a chain's class; the second is the class it had, whose forward it falls back to. Equal to it bit for bit.

    A hook on any module inside, a compiler and whoever records operators find the forward as it was written.
    """

    _chain: tuple[tuple[Step, ...], list[Any], list[Any]]  # steps, their layers, all hooks inside; without a module's slow look-ups

    def forward(self, x: Tensor) -> Tensor:
        found = self._plan(x)
        return super().forward(x) if found is None else _run(x, *self._chain[:2], *found)  # pyright: ignore[reportAttributeAccessIssue]

    def _plan(self, x: Tensor) -> Any:
        """Sizes and places of the values; None where somebody or a hook looks on, or what is given has no place in a kernel."""
        steps, layers, hooks = self._chain
        if not unobserved(x) or x.dtype != torch.float32 or x.dim() != 4 or any(hooks) or _has_any_global_hook():
            return None
        if any(layer.finish.dtype not in (torch.float32, torch.int32) for layer in layers):
            return None
        return _places(steps, (x.shape[0], *x.shape[2:]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare, (type(self).__bases__[1],), self.__dict__


@cache
def _class_of(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Packed{kind.__name__}", (PackedChain, kind), {"__module__": kind.__module__})


def _bare(kind: type[nn.Module]) -> nn.Module:
    made = _class_of(kind)
    return made.__new__(made)


@lru_cache(maxsize=64)
def _places(steps: tuple[Step, ...], size: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[int], int] | None:
    """Size of each value, place of each step's result but the last, and the bytes for all; None where sizes are not equal or not there."""
    last = {value: i for i, step in enumerate(steps) for value in (step.source, step.plus)}
    sizes, places, room, end = [size], [], [0], 0
    free: list[tuple[int, int]] = []
    for i, step in enumerate(steps):
        found, count = step.result(sizes[step.source])
        if min(found[1:]) < 1 or (step.plus is not None and sizes[step.plus] != found):
            return None
        count = -(-count // LINE) * LINE
        fitting = min((block for block in free if block[0] >= count), default=None)
        if fitting:
            free.remove(fitting)
        sizes.append(found)
        room.append(fitting[0] if fitting else count)
        places.append(fitting[1] if fitting else end)
        end += 0 if fitting or i == len(steps) - 1 else count
        free += [(room[value], places[value - 1]) for value in {step.source, step.plus} if value and last[value] == i]
    return sizes, places[:-1], end


def _run(x: Tensor, steps: Sequence[Step], layers: Sequence[Any], sizes: list[tuple[int, ...]], places: list[int], room: int) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    memory, out = torch.empty(room, dtype=torch.uint8), torch.empty((*sizes[-1], steps[-1].filters))
    start, threads = memory.data_ptr(), torch.get_num_threads()
    at = [x.data_ptr(), *(start + place for place in places), out.data_ptr()]
    for i, (step, layer) in enumerate(zip(steps, layers, strict=True)):
        layout = WORDS if step.source and steps[step.source - 1].to_words else LAST
        plus = 0 if step.plus is None else at[step.plus]
        addresses = layer.panel.data_ptr(), layer.finish.data_ptr(), at[i + 1], step.filters
        xnor.convolve(at[step.source], layout, sizes[step.source], *addresses, step.to_words, step.geometry, threads, plus=plus)
    return out.permute(0, 3, 1, 2)


class _Proxy(fx.Proxy):
    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})  # fx itself takes it for an addition


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PackedConv2d) or super().is_leaf_module(m, module_qualified_name)


def link(module: nn.Module) -> bool:
    """Make `module` a chain; False where it has fewer than two packed layers or does anything but run them and add."""
    if sum(isinstance(inner, PackedConv2d) for inner in module.modules()) < 2 or next(module.parameters(), None) is not None:
        return False
    try:
        steps = _steps(_Tracer().trace(module), module)
    except Exception:  # whatever a forward may raise on being traced: it then stays as it is
        return False
    if steps:
        hooks = [hooks for inner in module.modules() for hooks in (inner._forward_hooks, inner._forward_pre_hooks)]
        module.__dict__["_chain"] = tuple(steps), [module.get_submodule(step.layer) for step in steps], hooks
        module.__class__ = _class_of(type(module))
    return bool(steps)


def _steps(graph: fx.Graph, module: nn.Module) -> list[Step]:
    """The steps of a graph, or none."""
    steps: list[Step] = []
    value: dict[fx.Node, int] = {}
    origin: list[fx.Node] = []  # of each value
    for node in graph.nodes:
        known = all(isinstance(argument, fx.Node) for argument in node.args) and not node.kwargs
        kind = type(module.get_submodule(str(node.target))) if node.op == "call_module" else None
        if node.op == "placeholder" and not origin and not node.args:
            value[node] = 0
            origin.append(node)
        elif kind is nn.Identity and known:
            value[node] = value[node.args[0]]
        elif kind is PackedConv2d and known:
            layer: Any = module.get_submodule(str(node.target))
            steps.append(Step(str(node.target), layer.geometry, layer.filters, layer.to_words, value[node.args[0]]))
            value[node] = len(steps)
            origin.append(node)
        elif node.target in ADDITIONS and known and len(node.args) == 2:
            early, late = sorted(value[argument] for argument in node.args)
            changed = value[node.args[0]] if node.target in IN_PLACE else late
            floats = not any(given and steps[given - 1].to_words for given in (early, late))
            alone = all(given and _readers(origin[given], module) == 1 for given in (late, changed))
            if not (floats and alone and steps[late - 1].plus is None):
                return []
            steps[late - 1] = steps[late - 1]._replace(plus=early)
            value[node], origin[late] = late, node
        elif node.op != "output" or not known or value[node.args[0]] != len(steps) or steps[-1].to_words:
            return []
    return steps


def _readers(node: fx.Node, module: nn.Module) -> int:
    """Who reads a result, behind identities."""
    passes = [user.op == "call_module" and type(module.get_submodule(str(user.target))) is nn.Identity for user in node.users]
    return sum(_readers(user, module) if passed else 1 for user, passed in zip(node.users, passes, strict=True))
