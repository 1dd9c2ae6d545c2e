"""What a model's numbers are stored in, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_cnn.functional.rounding import Format, as_format

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


@dataclass(frozen=True)
class Line:
    """A layer: its format, numbers, bytes, how many times smaller than float32, and the share of weights at the range's ends."""

    layer: str
    format: str
    numbers: int
    nbytes: int
    smaller: float
    saturated: float


class Report(list[Line]):
    """Lines that print as a table with a total."""

    def __str__(self) -> str:
        total = Line("total", "", sum(r.numbers for r in self), sum(r.nbytes for r in self), 0.0, 0.0)
        width = max(len(line.layer) for line in [*self, total])
        head = f"{'layer':<{width}}  {'format':<10} {'numbers':>12} {'bytes':>12} {'smaller':>8} {'saturated':>10}"
        rows = [
            f"{r.layer:<{width}}  {r.format:<10} {r.numbers:>12,} {r.nbytes:>12,} {r.smaller:>7.1f}x {r.saturated:>10.2%}" for r in self
        ]
        smaller = 4 * total.numbers / max(1, total.nbytes)
        return "\n".join([head, *rows, f"{'total':<{width}}  {'':<10} {total.numbers:>12,} {total.nbytes:>12,} {smaller:>7.1f}x"])


def report(model: nn.Module, formats: Mapping[str, str | tuple[int, int]] | None = None) -> Report:
    """The storage of each layer with parameters or packed bits, and the share of its weights that saturate.

    A layer's format is its weight's dtype; `formats` (layer name or "" for the rest: format) names a grid that float32 or bfloat16
    numbers lie on, such as `{"": (6, 10)}`, and bytes are then those of the grid. Packed layers count their buffers.

    >>> print(report(nn.Sequential(nn.Linear(4, 2).bfloat16())))
    layer  format          numbers        bytes  smaller  saturated
    0      bf16                 10           20     2.0x      0.00%
    total                       10           20     2.0x
    """
    lines = Report()
    for name, layer in model.named_modules():
        tensors: list[Tensor] = [*layer.parameters(recurse=False)] or [
            b for b in layer.buffers(recurse=False) if b.dtype in (torch.int64, torch.uint8)
        ]
        if tensors:
            lines.append(_line(name or "(model)", tensors, (formats or {}).get(name, (formats or {}).get(""))))
    return lines


def _line(name: str, tensors: list[Tensor], declared: str | tuple[int, int] | None) -> Line:
    largest = max(tensors, key=Tensor.numel)
    if not largest.is_floating_point():
        numbers, stored = sum(8 * t.nbytes for t in tensors), sum(t.nbytes for t in tensors)
        return Line(name, "1 bit", numbers, stored, 4 * numbers / stored, 0.0)
    numbers = sum(tensor.numel() for tensor in tensors)
    if declared is None:
        target = as_format(NAMES[largest.dtype]) if largest.dtype in NAMES else None
        stored = sum(tensor.nbytes for tensor in tensors)
    else:
        target = as_format(declared)
        stored = numbers * (target.bits or 32) // 8
    saturated = sum(_at_the_ends(tensor, target) for tensor in tensors) / numbers if target else 0.0
    return Line(name, target.name if target else "fp32", numbers, stored, 4 * numbers / stored, saturated)


def _at_the_ends(tensor: Tensor, target: Format) -> int:
    value = tensor.detach().float()
    return int(((value <= target.low) | (value >= target.high)).sum())
