"""What every layer of a network makes, costs and sees: `print(architecture(model, torch.rand(1, 3, 224, 224)))`.

The receptive field is theoretical: what an output pixel can depend on, over residuals and parallel branches. What it does depend on is
`effective_field`, which is smaller and grows like the square root of the depth.

Source: CS231n 2016, lecture 11; Luo et al. 2016, "Understanding the effective receptive field", arXiv:1701.04128 (effective field);
Williams et al. 2009, "Roofline" (arithmetic intensity).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cnn.errors import ConfigurationError, UnsupportedLayerError
from lightning_cnn.functional.receptive_field import Field
from lightning_cnn.functional.roofline import Roofline
from lightning_cnn.nn._field_tracker import FieldTracker


@dataclass(frozen=True)
class Row:
    """One call of one layer. `seen` are the fields along height and width; None where the picture does not arrive."""

    name: str
    kind: str
    kernel: tuple[int, ...] | None
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int
    activation_bytes: int
    moved_bytes: int
    seen: tuple[Field, Field] | None

    @property
    def intensity(self) -> float:
        """Floating-point operations (two a multiply-add) for a byte read or written once: input, weights and output."""
        return 2 * self.multiply_adds / max(self.moved_bytes, 1)


@dataclass(frozen=True)
class Architecture:
    """The layers in the order they ran. Totals count the whole model, with what it computes outside of its layers."""

    rows: tuple[Row, ...]
    parameters: int
    multiply_adds: int
    best: Roofline | None = None

    def attainable_s(self, row: Row) -> float:
        """The least time for a layer on the device that `best` was measured on."""
        return self.best.attainable_s(2 * row.multiply_adds, row.moved_bytes) if self.best else 0.0

    @property
    def activation_bytes(self) -> int:
        return sum(row.activation_bytes for row in self.rows)

    def __getitem__(self, name: str) -> Row:
        """The last call of the layer `name`."""
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise KeyError(f"No layer {name!r} ran. Those that did: {', '.join(dict.fromkeys(row.name for row in self.rows))}.")
        return found[-1]

    def __str__(self) -> str:
        head = ("layer", "kind", "kernel", "output", "parameters", "MAdd", "act. MiB", "flop/B", "field", "stride", "offset")
        total = ("total", "", "", "", f"{self.parameters:,}", _big(self.multiply_adds), f"{self.activation_bytes / 2**20:.2f}")
        lines = [head, *(_cells(row) for row in self.rows), (*total, "", "", "", "")]
        return _table(lines if self.best is None else self._with_roof(lines, self.best))

    def _with_roof(self, lines: list[tuple[str, ...]], best: Roofline) -> list[tuple[str, ...]]:
        """Behind the intensity, what bounds each layer and the time it needs at least."""
        times = [self.attainable_s(row) for row in self.rows]
        bounds = [best.bound(2 * row.multiply_adds, row.moved_bytes) for row in self.rows]
        cells = [
            ("bound", "best ms"),
            *((bound, f"{1e3 * s:.3f}") for bound, s in zip(bounds, times, strict=True)),
            ("", f"{1e3 * sum(times):.3f}"),
        ]
        return [(*line[:8], *more, *line[8:]) for line, more in zip(lines, cells, strict=True)]


def architecture(model: nn.Module, *inputs: Any, best: Roofline | None = None) -> Architecture:
    """Run `model(*inputs)` once in evaluation mode, without gradients, and read off its layers; the first tensor is the picture.

    `best` is what the device can do (`lightning_cnn.functional.roofline.roofline()`): with it the table says what bounds each layer, and
    the time it needs at least. The model is left as it was, its training flags included. Swapped convolutions run, for this pass, in
    torch's way.

    Raises:
        ConfigurationError: there is no picture (b c h w) among the inputs.
    """
    picture = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    if picture is None or picture.dim() != 4:
        got = "no tensor" if picture is None else f"a tensor of shape {tuple(picture.shape)}"
        raise ConfigurationError(f"architecture() needs a batch of pictures (b c h w) as its first tensor; got {got}.")
    with torch.inference_mode(), evaluating(model), FieldTracker(picture) as tracker, _watched(model, tracker) as rows:
        model(*inputs)
    return Architecture(tuple(rows), sum(p.numel() for p in model.parameters()), tracker.multiply_adds, best)


def effective_field(model: nn.Module, layer: str, image: Tensor) -> Tensor:
    """How much the middle output pixel of `layer` depends on each pixel (h w): mean of |gradient| over channels and pictures, sum 1."""
    found: list[Tensor] = []
    image = image.detach().clone().requires_grad_(True)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output)

    handle = model.get_submodule(layer).register_forward_hook(keep)
    try:
        with torch.enable_grad(), evaluating(model):
            model(image)
    finally:
        handle.remove()
    if not found or found[-1].dim() != 4:
        raise UnsupportedLayerError(
            f"Layer '{layer}' gives no feature map (b c h w), so it has no middle pixel. Choose an earlier layer."
        )
    height, width = found[-1].shape[-2:]
    (gradient,) = torch.autograd.grad(found[-1][:, :, height // 2, width // 2].sum(), image)
    strength = gradient.abs().mean((0, 1))
    return strength / strength.sum().clamp_min(torch.finfo(strength.dtype).tiny)


def effective_size(strength: Tensor) -> float:
    """Side in pixels of the square with as many pixels as count for more than 4.55 % of the strongest (two standard deviations)."""
    return float((strength > 0.0455 * strength.max()).sum()) ** 0.5


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _watched(model: nn.Module, tracker: FieldTracker) -> Iterator[list[Row]]:
    rows: list[Row] = []
    started: list[int] = []

    def before(module: nn.Module, args: Any) -> None:
        started.append(tracker.multiply_adds)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        done = tracker.multiply_adds - started.pop()
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if results:
            rows.append(_row(names[module], module, args, results[0], done, tracker))

    names = {module: name or type(model).__name__ for name, module in model.named_modules() if not any(module.children())}
    handles = [hook for m in names for hook in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _row(name: str, module: nn.Module, args: Any, output: Tensor, done: int, tracker: FieldTracker) -> Row:
    seen = tracker.seen(output)
    moved = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)] + list(module.parameters()) + [output]
    kernel = getattr(module, "kernel_size", None)
    return Row(
        name=name,
        kind=type(module).__name__,
        kernel=(kernel, kernel) if isinstance(kernel, int) else kernel,
        output=tuple(output.shape),
        parameters=sum(p.numel() for p in module.parameters()),
        multiply_adds=done,
        activation_bytes=0 if getattr(module, "inplace", False) else _bytes(output),
        moved_bytes=sum(_bytes(tensor) for tensor in moved),
        seen=seen.fields if seen else None,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cells(row: Row) -> tuple[str, ...]:
    times, seen = "x".join, row.seen or ()
    return (
        row.name,
        row.kind,
        times(map(str, row.kernel or ())),
        times(map(str, row.output)),
        f"{row.parameters:,}",
        _big(row.multiply_adds),
        f"{row.activation_bytes / 2**20:.2f}",
        f"{row.intensity:.1f}" if row.multiply_adds else "",
        times(str(field.size) for field in seen),
        times("all" if field.stride == 0 else f"{field.stride:g}" for field in seen),
        times(f"{field.offset:g}" for field in seen),
    )


def _big(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count or "")


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Columns with names to the left and numbers to the right, a rule below the head and above the total."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))) for line in lines]
    rule = "-" * len(text[0])
    return "\n".join(line.rstrip() for line in [text[0], rule, *text[1:-1], rule, text[-1]])
