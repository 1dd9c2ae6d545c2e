"""Cut a network into stages that pass one tensor each, without changing it: the stages hold the network's own layers."""

import itertools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lightning_cnn.errors import UnsupportedLayerError
from lightning_cnn.functional.partition import balanced_cuts
from lightning_cnn.nn.stages import evaluating


class Chain(NamedTuple):
    """A traced network, and the places (names of nodes) after which only one tensor is alive: there it may be cut."""

    network: nn.Module
    graph: fx.Graph
    places: list[str]

    @classmethod
    def of(cls, network: nn.Module) -> "Chain":
        try:
            graph = _Tracer().trace(network)
        except Exception as error:
            raise UnsupportedLayerError(
                f"{type(network).__name__} cannot be traced by torch.fx, so it cannot be cut into stages ({error}). Put the part that "
                "branches on values into a module of its own inside an nn.Sequential."
            ) from error
        if sum(node.op == "placeholder" for node in graph.nodes) != 1:
            raise UnsupportedLayerError(f"{type(network).__name__}.forward must take one tensor, the pictures, to be cut into stages.")
        return cls(network, graph, _places(network, graph))

    def stage(self, after: str | None, until: str | None) -> fx.GraphModule:
        """The part that begins after one place and ends with another (None: from the beginning, to the end)."""
        part, values = fx.Graph(), {}
        inside = after is None

        def value(node: fx.Node) -> fx.Node:
            if node.op == "get_attr" and node not in values:
                values[node] = part.node_copy(node)
            return values[node]

        for node in self.graph.nodes:
            if inside and node.op not in ("output", "get_attr"):
                values[node] = part.node_copy(node, value)
            if node.name == after:
                values[node], inside = part.placeholder("picture"), True
            if inside and (node.name == until or node.op == "output"):
                result = values[node] if node.op != "output" else fx.map_arg(node.args[0], value)
                part.output(result)
                break
        return fx.GraphModule(self.network, part)

    def balanced(self, picture: Tensor, parts: int, repeats: int = 3) -> tuple[list[str], list[float]]:
        """Places that make the slowest part as fast as possible, and each part's forward seconds, as measured on these pictures."""
        if len(self.places) < parts - 1:
            raise UnsupportedLayerError(
                f"{type(self.network).__name__} has {len(self.places)} places where one tensor alone passes, and {parts} stages need "
                f"{parts - 1}. Use fewer stages."
            )
        timed = [_times(self, picture) for _ in range(repeats)]
        seconds = [min(column) for column in zip(*timed, strict=True)]
        cuts = balanced_cuts(seconds, parts)
        ends = [0, *cuts, len(seconds)]
        return [self.places[cut - 1] for cut in cuts], [sum(seconds[a:b]) for a, b in itertools.pairwise(ends)]

    def before(self, modules: Sequence[str]) -> list[str]:
        """The places before which each named module begins."""
        nodes = list(self.graph.nodes)
        found = []
        for name in modules:
            first = next((i for i, node in enumerate(nodes) if _belongs(node, name)), None)
            if first is None:
                raise UnsupportedLayerError(f"stages: there is no layer {name!r} in {type(self.network).__name__}")
            if nodes[first - 1].name not in self.places:
                raise UnsupportedLayerError(
                    f"stages: more than one tensor is alive before {name!r}, so no stage can begin there; try a whole block or layer"
                )
            found.append(nodes[first - 1].name)
        return found


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, nn.Sequential) and (super().is_leaf_module(m, module_qualified_name) or not any(m.children()))


class _Stopwatch(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, places: list[str]) -> None:
        super().__init__(module)
        self.places, self.marks = places, [time.perf_counter()]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.places:
            if isinstance(result, Tensor) and result.is_cuda:
                torch.cuda.synchronize(result.device)
            self.marks.append(time.perf_counter())
        return result


def _times(chain: Chain, picture: Tensor) -> list[float]:
    devices = [picture.device] if picture.is_cuda else []
    with torch.no_grad(), evaluating(chain.network), torch.random.fork_rng(devices):
        watch = _Stopwatch(fx.GraphModule(chain.network, chain.graph), chain.places)
        watch.run(picture)
    marks = [*watch.marks, time.perf_counter()]
    return [b - a for a, b in itertools.pairwise(marks)]


def _places(network: nn.Module, graph: fx.Graph) -> list[str]:
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    last = {node: max((position[user] for user in node.users), default=-1) for node in nodes}
    layers = [i for i, node in enumerate(nodes) if node.op in ("call_module", "call_function", "call_method")]
    found = []
    for i in layers[:-1]:
        alive = [node for node in nodes[: i + 1] if last[node] > i and node.op != "get_attr"]
        if alive == [nodes[i]] and not any(_in_place(user, network) for user in nodes[i].users):
            found.append(nodes[i].name)
    return found


def _in_place(node: fx.Node, network: nn.Module) -> bool:
    """Whether a layer overwrites what it is given, which what comes from another process does not allow."""
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(str(node.target)), "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    return (
        bool(node.kwargs.get("inplace", False)) or (name.endswith("_") and not name.endswith("__")) or name in ("iadd", "imul", "isub")
    )


def _belongs(node: fx.Node, module: str) -> bool:
    target = str(node.target) if node.op == "call_module" else ""
    return target == module or target.startswith(f"{module}.")
