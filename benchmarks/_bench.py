"""Shared by the benchmarks: interleaved runs, medians, one row format, one table."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median


@dataclass
class Row:
    """`ratio` above 1 means that ours is better; `theirs` is None where the peer was not at hand."""

    row: str
    peer: str
    ours: float | None
    theirs: float | None
    unit: str
    ratio: float | None = None
    bar: float | None = None
    n: int = 0
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: versions())
    commit: str = field(default_factory=lambda: commit())


def compare(
    row: str, peer: str, ours: float, theirs: float, unit: str, *, larger_is_better: bool, bar: float | None = None, n: int
) -> Row:
    return Row(row, peer, ours, theirs, unit, ours / theirs if larger_is_better else theirs / ours, bar, n)


def missing(row: str, peer: str, how: str) -> Row:
    """A peer that is not installed is named, with the way to install it."""
    return Row(row, f"{peer} (not installed: {how})", None, None, "")


def interleave(functions: Mapping[str, Callable[[], float]], n: int) -> dict[str, list[float]]:
    """Call each function once a round, n rounds, so that what disturbs the machine disturbs them all; each is first in its turn."""
    results: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions.items())
    for _ in range(n):
        for name, function in order:
            results[name].append(function())
        order = order[1:] + order[:1]
    return results


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(results: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in results.items()}


def report(rows: list[Row], json_path: str | None = None) -> None:
    """Print the table; write the rows where asked."""
    print(f"{'row':<44} {'peer':<44} {'ours':>10} {'theirs':>10} {'unit':<10} {'ratio':>7} {'bar':>5}  n")
    for r in rows:
        numbers = [f"{value:.4g}" if value is not None else "-" for value in (r.ours, r.theirs, r.ratio, r.bar)]
        print(f"{r.row:<44} {r.peer:<44} {numbers[0]:>10} {numbers[1]:>10} {r.unit:<10} {numbers[2]:>7} {numbers[3]:>5}  {r.n}")
    if json_path:
        Path(json_path).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} cores of {name}"


def versions() -> dict[str, str]:
    wanted = ("torch", "torchvision", "lightning", "numba", "numpy")
    return {name: metadata.version(name) for name in wanted} | {"python": platform.python_version()}


def commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return run.stdout.strip()
