"""Find the stages of a convolutional network, from stem to head.

A stage begins where the picture becomes smaller, as in every drawing of a CNN; the head is the last layer with weights that runs. Both
are read off one run without data (meta tensors: shapes only), so nothing about a model family is known here. Transfer learning asks for
stages again and again: what to freeze, how fast each part learns, where to read features.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_cnn.errors import UnsupportedLayerError, raise_all

SIZES_PX = (224, 299, 128, 64, 32, 28, 16, 8)


@dataclass(frozen=True)
class Stage:
    """`modules` in the order in which they run; `loose` are parameters that belong to no module of any stage (they go to the head)."""

    name: str
    modules: tuple[nn.Module, ...]
    loose: tuple[nn.Parameter, ...] = ()

    def parameters(self) -> Iterator[nn.Parameter]:
        seen = {}
        for module in self.modules:
            seen.update((id(parameter), parameter) for parameter in module.parameters())
        seen.update((id(parameter), parameter) for parameter in self.loose)
        return iter(seen.values())


@dataclass(frozen=True)
class Unit:
    """One link of the chain of modules that a picture walks through, and its longer side before and after (0: no picture)."""

    name: str
    module: nn.Module
    before_px: int
    after_px: int

    @property
    def shrinks(self) -> bool:
        return 3 * self.after_px <= 2 * self.before_px and self.before_px > 0  # an unpadded convolution only trims the border

    @property
    def weights(self) -> list[nn.Parameter]:
        return list(self.module.parameters())


def stages(model: nn.Module, patterns: Sequence[str] | None = None) -> list[Stage]:
    """The stages of `model` from stem to head; each parameter belongs to exactly one.

    `patterns` name them instead: one regular expression a stage, matched against whole module names; the last one is the head and
    takes whatever no pattern names. Parts that a plain forward pass does not run (auxiliary classifiers) count as head.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(2))
    >>> _ = net(torch.zeros(1, 3, 8, 8))
    >>> [stage.name for stage in stages(net)]
    ['stem', '2', 'head']
    """
    groups = _named(model, patterns) if patterns else _grouped(units(model))
    return _complete(model, groups)


def units(model: nn.Module) -> list[Unit]:
    """The chain of modules a picture walks through, in the order in which they run; the last one with weights is the head.

    A module is opened as long as it makes the picture smaller more than once or contains the head, so residual blocks, branches and
    squeeze-excitations stay whole.
    """
    runs = _trace(model)
    names = [name for name, module in model.named_modules() if name in runs and _is_layer(module)]
    if not names:
        raise UnsupportedLayerError(f"{type(model).__name__} has no layers with weights that run; name the stages with patterns=[...].")
    head = max(names, key=lambda name: runs[name][0])
    return sorted(_opened("", model, runs, head), key=lambda unit: runs[unit.name][0])


def _opened(name: str, module: nn.Module, runs: dict, head: str) -> Iterator[Unit]:
    _, before, after = runs[name]
    children = [(f"{name}.{child}".lstrip("."), inner) for child, inner in module.named_children()]
    children = [(child, inner) for child, inner in children if child in runs]
    holds_head = name == "" or head.startswith(f"{name}.")
    if children and (holds_head or before >= 3 * max(after, 1)):
        for child, inner in children:
            yield from _opened(child, inner, runs, head)
    else:
        yield Unit(name, module, before, after)


def _grouped(chain: list[Unit]) -> list[tuple[str, list[nn.Module]]]:
    """Cut the chain before every unit that shrinks the picture, and before the head."""
    head = max(i for i, unit in enumerate(chain) if unit.weights)
    parts: list[list[Unit]] = [[]]
    for i, unit in enumerate(chain[:head]):
        flattened = unit.before_px == 0 and i > 0 and chain[i - 1].before_px > 0
        if (unit.shrinks or flattened) and any(part.weights for part in parts[-1]):
            parts.append([])
        parts[-1].append(unit)
    kept: list[list[Unit]] = []
    for part in parts:
        # Norms and poolings alone are no stage: they belong to what they follow, except in front of the head.
        if kept and not any(weight.dim() > 1 for unit in part for weight in unit.weights):
            kept[-1].extend(part)
        else:
            kept.append(part)
    kept = [part for part in kept if any(unit.weights for unit in part)]
    named = [("stem" if i == 0 else _label(part), [unit.module for unit in part]) for i, part in enumerate(kept)]
    return [*named, ("head", [unit.module for unit in chain[head:]])]


def _label(part: list[Unit]) -> str:
    names = [unit.name for unit in part if any(weight.dim() > 1 for weight in unit.weights)]
    first, last = names[0], names[-1]
    together = first.rpartition(".")[0] == last.rpartition(".")[0]
    return first if first == last else f"{first}..{last.rpartition('.')[2] if together else last}"


def _named(model: nn.Module, patterns: Sequence[str]) -> list[tuple[str, list[nn.Module]]]:
    groups, taken, problems = [], set(), []
    for pattern in patterns:
        found = {name: module for name, module in model.named_modules() if name and re.fullmatch(pattern, name)}
        outer = {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}
        if not outer:
            problems.append(f"stage pattern {pattern!r} matches no module; there are {_some(n for n, _ in model.named_modules() if n)}")
        twice = sorted(name for name, module in outer.items() if taken & {id(p) for p in module.parameters()})
        problems += [f"stage pattern {pattern!r} takes {name!r}, which an earlier pattern has taken" for name in twice]
        taken |= {id(parameter) for module in outer.values() for parameter in module.parameters()}
        groups.append((pattern, list(outer.values())))
    raise_all(problems, UnsupportedLayerError)
    return groups


def _complete(model: nn.Module, groups: list[tuple[str, list[nn.Module]]]) -> list[Stage]:
    owned = {id(parameter) for _, modules in groups for module in modules for parameter in module.parameters()}
    loose = tuple(parameter for parameter in model.parameters() if id(parameter) not in owned)
    found = [Stage(name, tuple(modules)) for name, modules in groups]
    return [*found[:-1], Stage(found[-1].name, found[-1].modules, loose)]


def _trace(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """name -> (position in the order of completion, side before, side after), from a run on meta tensors in evaluation mode."""
    problems = []
    for shape in _shapes(model):
        runs: dict[str, tuple[int, int, int]] = {}
        try:
            with torch.no_grad(), evaluating(model), _watching(model, runs):
                state = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
                torch.func.functional_call(model, state, (torch.empty(shape, device="meta"),), tie_weights=False)
            return runs
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            problems.append(f"{shape[-1]} px: {error}")
    raise UnsupportedLayerError(
        f"{type(model).__name__} could not be run without data to find its stages ({problems[0].splitlines()[0]}). "
        "Name them from stem to head, e.g. patterns=['conv1|bn1', 'layer[12]', 'layer[34]', 'fc'], or set example_input_array."
    )


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    example = getattr(model, "example_input_array", None)
    if isinstance(example, Tensor):
        yield tuple(example.shape)
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    yield from ((2, c, size, size) for c in dict.fromkeys((channels, 3, 1)) for size in SIZES_PX)


@contextmanager
def _watching(model: nn.Module, runs: dict) -> Iterator[None]:
    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            runs.setdefault(name, (len(runs), _side_px(inputs), _side_px(output)))

        return hook

    # Other hooks are somebody's records of real data: put aside for the moment.
    others = {module: (module._forward_hooks.copy(), module._forward_pre_hooks.copy()) for module in model.modules()}
    for name, module in model.named_modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module.register_forward_hook(watch(name))
    try:
        yield
    finally:
        for module, (after, before) in others.items():
            module._forward_hooks.clear()
            module._forward_hooks.update(after)
            module._forward_pre_hooks.update(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _side_px(value: object) -> int:
    """The longer side of the first picture found, 0 when there is none or it has been pooled to one point."""
    if isinstance(value, Tensor):
        side = max(value.shape[-2:]) if value.dim() == 4 else 0
        return side if side > 1 else 0
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((side for item in inner if (side := _side_px(item))), 0)


def _is_layer(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
