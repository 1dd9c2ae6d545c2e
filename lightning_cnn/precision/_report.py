"""What a model's numbers are stored in, layer by layer."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cnn.functional.binary import lsq_range
from lightning_cnn.functional.rounding import Format, as_format
from lightning_cnn.nn.packed import PackedConv2d, PackedLinear

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
REPEATS = 5  # timings of a layer, the fastest of which counts


@dataclass(frozen=True)
class Line:
    """A layer: its format, numbers, bytes, and how many times smaller than float32 they are.

    saturated: the share of weights at the range's ends. flipped: of weights of one or two bits, the share that changed its value.
    faster: how many times faster the packed layer was than its float original. None where it does not apply or was not asked for.
    """

    layer: str
    format: str
    numbers: int
    nbytes: int
    smaller: float
    saturated: float | None = None
    flipped: float | None = None
    faster: float | None = None

    def cells(self) -> list[str]:
        shares = [f"{share:.2%}" if share is not None else "-" for share in (self.saturated, self.flipped)]
        faster = f"{self.faster:.1f}x" if self.faster is not None else "-"
        return [self.layer, self.format, f"{self.numbers:,}", f"{self.nbytes:,}", f"{self.smaller:.1f}x", *shares, faster]


class Report(list[Line]):
    """Lines that print as a table with a total."""

    def __str__(self) -> str:
        numbers, nbytes = sum(line.numbers for line in self), sum(line.nbytes for line in self)
        total = Line("total", "", numbers, nbytes, 4 * numbers / max(1, nbytes))
        head = ["bytes" if field.name == "nbytes" else field.name for field in fields(Line)]
        rows = [head, *(line.cells() for line in [*self, total])]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def report(
    model: nn.Module,
    formats: Mapping[str, str | tuple[int, int]] | None = None,
    *,
    since: Mapping[str, Tensor] | None = None,
    beside: tuple[nn.Module, Any] | None = None,
) -> Report:
    """The storage of each layer with parameters or packed bits, and what its format costs.

    A layer's format is its weight's dtype, or that of `LowBit`; `formats` (layer name or "" for the rest: format) names a grid that
    float32 or bfloat16 numbers lie on, such as `{"": (6, 10)}`, and bytes are then those of the grid. Packed layers count their buffers.

    since: an earlier `state_dict()` of the model; binary and ternary layers then say how many of their weights have flipped.
    beside: the float model that was packed, and an input; each packed layer is then timed beside its original on what both are given.

    >>> print(report(nn.Sequential(nn.Linear(4, 2).bfloat16())))
    layer  format  numbers  bytes  smaller  saturated  flipped  faster
    0      bf16         10     20     2.0x      0.00%        -       -
    total               10     20     2.0x          -        -       -
    """
    times = _times(model, *beside) if beside else {}
    lines = Report()
    for name, layer in model.named_modules():
        tensors: list[Tensor] = [*layer.parameters(recurse=False)] or [
            b for b in layer.buffers(recurse=False) if b.dtype in (torch.int64, torch.uint8)
        ]
        if tensors:
            declared = (formats or {}).get(name, (formats or {}).get(""))
            line = _lowered(name, layer, tensors, since) if hasattr(layer, "bits") else _line(name, tensors, declared, times.get(name))
            lines.append(line)
    return lines


def _line(name: str, tensors: list[Tensor], declared: str | tuple[int, int] | None, faster: float | None) -> Line:
    largest = max(tensors, key=Tensor.numel)
    if not largest.is_floating_point():
        numbers, stored = sum(8 * t.nbytes for t in tensors), sum(t.nbytes for t in tensors)
        return Line(name or "(model)", "1 bit", numbers, stored, 4 * numbers / stored, faster=faster)
    numbers = sum(tensor.numel() for tensor in tensors)
    if declared is None:
        target = as_format(NAMES[largest.dtype]) if largest.dtype in NAMES else None
        stored = sum(tensor.nbytes for tensor in tensors)
    else:
        target = as_format(declared)
        stored = numbers * (target.bits or 32) // 8
    saturated = sum(_at_the_ends(tensor, target) for tensor in tensors) / numbers if target else None
    return Line(name or "(model)", target.name if target else "fp32", numbers, stored, 4 * numbers / stored, saturated)


def _at_the_ends(tensor: Tensor, target: Format) -> int:
    value = tensor.detach().float()
    return int(((value <= target.low) | (value >= target.high)).sum())


@torch.no_grad()
def _lowered(name: str, layer: Any, tensors: list[Tensor], since: Mapping[str, Tensor] | None) -> Line:
    """A layer that computes with few bits and holds its latent weights in float."""
    numbers, stored, bits = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors), layer.bits.weights
    saturated = flipped = None
    if bits is not None and bits > 2:
        low, high = lsq_range(bits)
        counts = (layer.weight / layer.weight_step).round()
        saturated = ((counts < low) | (counts > high)).float().mean().item()
    elif bits is not None:
        saturated = (layer.weight.abs() >= 1).float().mean().item()  # where the straight-through estimator ends
        if since is not None:
            flipped = _flipped(layer, since[f"{name}.weight".lstrip(".")])
    return Line(name or "(model)", str(layer.bits), numbers, stored, 4 * numbers / stored, saturated, flipped)


def _flipped(layer: Any, earlier: Tensor) -> float:
    now, kept = layer.quantized_weight()[0], layer.weight.detach().clone()
    layer.weight.copy_(earlier)
    then = layer.quantized_weight()[0]
    layer.weight.copy_(kept)
    return (now != then).float().mean().item()


@torch.inference_mode()
def _times(packed: nn.Module, original: nn.Module, x: Any) -> dict[str, float]:
    """How many times faster each packed layer is."""
    names = [name for name, layer in packed.named_modules() if isinstance(layer, (PackedConv2d, PackedLinear))]
    given = [_inputs(model, names, x) for model in (packed, original)]
    return {
        name: _seconds(original.get_submodule(name), given[1][name]) / _seconds(packed.get_submodule(name), given[0][name])
        for name in names
    }


def _inputs(model: nn.Module, names: list[str], x: Any) -> dict[str, tuple[Any, ...]]:
    seen: dict[str, tuple[Any, ...]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, inputs: seen.update({name: inputs})

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


def _seconds(layer: nn.Module, inputs: tuple[Any, ...]) -> float:
    layer(*inputs)
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        layer(*inputs)
        found.append(time.perf_counter() - start)
    return min(found)
