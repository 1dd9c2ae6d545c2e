"""What was chosen for each layer, shape and pass, and why: as rows, as a table and as a picture."""

from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_cnn.conv import _tuner
from lightning_cnn.conv._call import ROLES, Call, load
from lightning_cnn.conv._operator import algorithm_for
from lightning_cnn.conv._swap import SwappedConv2d, replace_role


@dataclass(frozen=True)
class Row:
    """One pass of one layer for one shape; times and errors are None where nothing was measured."""

    layer: str
    shape: str
    role: str
    algorithm: str
    seconds: float | None
    speedup: float | None
    error: float | None
    workspace_mb: float
    reason: str


@dataclass(frozen=True)
class Report:
    """`print` it, or hand `rows` to `lightning_cnn.plot.conv_report`."""

    rows: list[Row]

    def table(self) -> Table:
        table = Table(title="Convolutions")
        for column in ("layer", "shape", "pass", "algorithm", "ms", "speed-up", "error", "MB", "reason"):
            table.add_column(column, justify="right" if column in ("ms", "speed-up", "error", "MB") else "left")
        for row in self.rows:
            numbers = (_text(row.seconds and row.seconds * 1e3, ".2f"), _text(row.speedup, ".2f"), _text(row.error, ".0e"))
            table.add_row(row.layer, row.shape, row.role, row.algorithm, *numbers, f"{row.workspace_mb:.0f}", row.reason)
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(width=200, file=StringIO())
        console.print(self.table())
        return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def report(model: nn.Module) -> Report:
    """The choices of a swapped model for the shapes it has met; layers that were left alone have one row that says why."""
    rows = []
    for name, layer in model.named_modules():
        if type(layer) is SwappedConv2d:
            calls = [each for call in layer._calls for each in _passes(call)]
            rows += [_row(name, each, layer._plan) for each in calls] or [_silent(name, "no picture has passed through it yet")]
        elif type(layer) is nn.Conv2d:
            rows.append(_silent(name, "not swapped"))
        elif isinstance(layer, nn.Conv2d):
            rows.append(_silent(name, f"{type(layer).__name__} computes in its own way and is left alone"))
    return Report(rows)


def _passes(call: Call) -> list[Call]:
    return [call] if call.keep else [call, *(replace_role(call, role) for role in ROLES[1:])]


def _row(name: str, call: Call, plan: str) -> Row:
    shape = f"{'x'.join(map(str, call.x))} * {'x'.join(map(str, call.weight))} /{call.geometry.stride[0]}"
    if plan.startswith("auto"):
        decision = _tuner.tuner_for(plan).decisions.get(call)
        if decision is None:
            return Row(name, shape, call.role, "default", None, None, None, 0.0, "not measured")
        workspace = decision.workspace / 2**20
        return Row(
            name, shape, call.role, decision.algorithm, decision.seconds, decision.speedup, decision.error, workspace, decision.reason
        )
    asked = plan.split("/")[ROLES.index(call.role) if "/" in plan else 0]
    algorithm = algorithm_for(call, plan)
    reason = "as asked" if algorithm == asked else f"{asked} {load(asked).refuses(call)}"
    return Row(name, shape, call.role, algorithm, None, None, None, load(algorithm).workspace(call) / 2**20, reason)


def _silent(name: str, reason: str) -> Row:
    return Row(name, "", "", "default", None, None, None, 0.0, reason)


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
