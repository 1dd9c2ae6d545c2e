"""Rewrite the convolutions of somebody's model to cheaper ones, in place: `print(factorize(model, layers="layer4.*"))`.

`factorize` and `depthwise_separable` start as close to the old filters as their form allows; `stack_small_filters` and `bottleneck` have
nonlinearities inside, so they start anew and want training. A layer that would not get cheaper is left alone, with the reason. The rest
of the model stays the same objects, and an optimizer given along keeps its state for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.optim import Optimizer

from lightning_cnn.errors import UnsupportedLayerError
from lightning_cnn.nn.blocks import Bottleneck, FactorizedConv, SeparableConv, SmallFilterStack

Layers = str | Sequence[str]


@dataclass(frozen=True)
class Saving:
    layer: str
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.layer}: {self.before:,} -> {self.after:,} weights ({self.before / self.after:.2f}x fewer)"


@dataclass(frozen=True)
class Rewrite:
    """What was rewritten with its parameters before and after, and what was not, with the reason."""

    savings: tuple[Saving, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [*map(str, self.savings), *(f"{name}: left alone, {reason}" for name, reason in self.skipped.items())]
        return "\n".join([*lines, str(Saving("total", sum(s.before for s in self.savings), sum(s.after for s in self.savings)))])


def stack_small_filters(model: nn.Module, *, layers: Layers = "*", optimizer: Optimizer | None = None) -> Rewrite:
    """KxK into (K - 1) / 2 filters of 3x3, with ReLU between."""

    def make(conv: nn.Conv2d) -> nn.Module:
        r = conv.kernel_size[0]
        return SmallFilterStack(conv.in_channels, conv.out_channels, r, stride=_stride(conv), bias=conv.bias is not None)

    return _rewrite(model, layers, make, lambda conv: _centred(conv) or _least(conv, 5), optimizer)


def bottleneck(
    model: nn.Module, *, layers: Layers = "*", middle: Callable[[nn.Conv2d], int] | None = None, optimizer: Optimizer | None = None
) -> Rewrite:
    """KxK into 1x1, KxK, 1x1 with ReLU between, over `middle(conv)` channels (half of the outputs unless given)."""

    def make(conv: nn.Conv2d) -> nn.Module:
        width = middle(conv) if middle else None
        r = conv.kernel_size[0]
        return Bottleneck(conv.in_channels, conv.out_channels, r, middle=width, stride=_stride(conv), bias=conv.bias is not None)

    return _rewrite(model, layers, make, lambda conv: _centred(conv) or _least(conv, 3), optimizer)


def factorize(model: nn.Module, *, layers: Layers = "*", rank: int | None = None, optimizer: Optimizer | None = None) -> Rewrite:
    """KxK into 1xK and Kx1 over `rank` channels (the outputs unless given), initialised by SVD."""
    return _rewrite(model, layers, lambda conv: FactorizedConv.of(conv, rank), lambda conv: _least(conv, 2), optimizer)


def depthwise_separable(model: nn.Module, *, layers: Layers = "*", optimizer: Optimizer | None = None) -> Rewrite:
    """KxK into a filter for each channel and a 1x1, initialised by the best rank-one product for each input channel."""
    return _rewrite(model, layers, SeparableConv.of, lambda conv: _least(conv, 2), optimizer)


def _rewrite(
    model: nn.Module,
    layers: Layers,
    make: Callable[[nn.Conv2d], nn.Module],
    unfit: Callable[[nn.Conv2d], str],
    optimizer: Optimizer | None,
) -> Rewrite:
    patterns = [layers] if isinstance(layers, str) else list(layers)
    savings, skipped = [], {}
    for name, conv in list(model.named_modules()):
        if not isinstance(conv, nn.Conv2d) or not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        reason = _plain(name, conv) or unfit(conv)
        made = make(conv) if not reason else None
        if made is not None and _count(made) >= _count(conv):
            reason, made = f"it would have {_count(made):,} weights for {_count(conv):,}", None
        if made is None:
            skipped[name] = reason
            continue
        savings.append(Saving(name, _count(conv), _count(made)))
        _replace(model, conv, made, optimizer)
    if not savings:
        listed = "; ".join(f"'{name}': {reason}" for name, reason in skipped.items()) or "no Conv2d has such a name"
        raise UnsupportedLayerError(f"Nothing to rewrite with layers={layers!r}: {listed}.")
    return Rewrite(tuple(savings), skipped)


def _replace(model: nn.Module, conv: nn.Conv2d, made: nn.Module, optimizer: Optimizer | None) -> None:
    """Put `made` wherever `conv` stands; its parameters are trained as the old ones were."""
    made.to(device=conv.weight.device, dtype=conv.weight.dtype).train(conv.training)
    made.requires_grad_(conv.weight.requires_grad)
    for parent in model.modules():
        for name, child in list(parent._modules.items()):  # named_children() would leave repetitions out
            if child is conv:
                setattr(parent, name, made)
    for group in optimizer.param_groups if optimizer else ():
        old = {id(p) for p in conv.parameters()}
        if any(id(p) in old for p in group["params"]):
            group["params"] = [p for p in group["params"] if id(p) not in old] + list(made.parameters())
    if optimizer:
        for parameter in conv.parameters():
            optimizer.state.pop(parameter, None)


def _plain(name: str, conv: nn.Conv2d) -> str:
    if not name:
        return "it is the model itself, which cannot be replaced in place"
    if type(conv) is not nn.Conv2d:
        return f"it is a {type(conv).__name__}"
    if conv.groups != 1:
        return f"it has {conv.groups} groups"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"its padding is {conv.padding!r} with {conv.padding_mode}"
    return ""


def _centred(conv: nn.Conv2d) -> str:
    r, s = conv.kernel_size
    if r != s or r % 2 == 0 or tuple(conv.padding) != (r // 2, r // 2) or tuple(conv.dilation) != (1, 1):
        return f"it is {r}x{s} with padding {tuple(conv.padding)} and dilation {tuple(conv.dilation)}, not odd, square and centred"
    return ""


def _least(conv: nn.Conv2d, size: int) -> str:
    r, s = conv.kernel_size
    return f"it is {r}x{s}" if min(r, s) < size else ""


def _stride(conv: nn.Conv2d) -> tuple[int, int]:
    return (conv.stride[0], conv.stride[1])


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
