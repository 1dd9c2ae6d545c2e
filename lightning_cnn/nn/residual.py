"""Find the residual branches of a network by following its additions."""

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


class _WholeLayers(fx.Tracer):
    """Sees every module without children as one step: what is inside a layer is not its concern."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(True for _ in m.children())


def residual_branches(model: nn.Module) -> list[str]:
    """The names of the modules that end a residual branch, in the order in which they run.

    Of two summands the branch is the one computed from the other, or the one with more steps since both parted; an equal number is no
    residual. Parts `torch.fx` cannot trace are searched child by child.

    >>> from torchvision.models import resnet18
    >>> residual_branches(resnet18())[:3]
    ['layer1.0.bn2', 'layer1.1.bn2', 'layer2.0.bn2']
    """
    return list(dict.fromkeys(_search(model, "")))


def _search(model: nn.Module, prefix: str) -> Iterator[str]:
    try:
        graph = _WholeLayers().trace(model)
    except Exception:  # whatever a model does that tracing cannot follow, its children are tried next
        for name, child in model.named_children():
            yield from _search(child, f"{prefix}{name}.")
        return
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for end in _ends(graph):
        if end.op == "call_module" and calls.count(end.target) == 1:
            yield f"{prefix}{end.target}"


def _ends(graph: fx.Graph) -> Iterator[fx.Node]:
    before: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        before[node] = {node}.union(*(before[previous] for previous in node.all_input_nodes))
        summands = node.all_input_nodes
        if node.target in ADDITIONS and len(summands) == 2:
            one, other = summands
            ahead, behind = len(before[one] - before[other]), len(before[other] - before[one])
            if ahead != behind:
                yield one if ahead > behind else other
