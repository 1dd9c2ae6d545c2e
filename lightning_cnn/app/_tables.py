"""Published numbers come from measured rows: tables between `<!-- bench NAME: GLOB -->` and `<!-- /bench -->`.

GLOB is of row names; several are separated by `|`. Rows are kept by name and peer in `benchmarks/results/NAME.json`, so that groups
measured on their own add up.
"""

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
BLOCK = re.compile(r"(<!-- bench (\w+): (.*?) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)


def keep(rows: Sequence[Row], file: Path) -> list[Row]:
    """Add measured rows to a file of results, each in the place of an older one of its name and peer; returns all of them."""
    old: list[Row] = json.loads(file.read_text()) if file.exists() else []
    known = {(row["row"], row["peer"]): row for row in old}
    known |= {(row["row"], row["peer"]): row for row in rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(list(known.values()), indent=1) + "\n")
    return list(known.values())


def pages(root: Path) -> list[Path]:
    """The README, the cards and the docs."""
    found = [root / "README.md", *sorted((root / "lightning_cnn").rglob("*.md")), *sorted((root / "docs").rglob("*.md"))]
    return [page for page in found if page.exists()]


def fill(page: Path, name: str, rows: Sequence[Row]) -> bool:
    """Write the tables of benchmark `name` in `page` anew; tells whether there was one."""
    text = page.read_text()

    def table_of(match: re.Match[str]) -> str:
        globs = [glob.strip() for glob in match[3].split("|")] if match[2] == name else []
        chosen = [row for row in rows if any(fnmatchcase(row["row"], glob) for glob in globs)]
        return f"{match[1]}{table(chosen, name)}{match[5]}" if chosen else match[0]

    filled = BLOCK.sub(table_of, text)
    if filled != text:
        page.write_text(filled)
    return filled != text


def table(rows: Sequence[Row], name: str) -> str:
    """Ours and theirs side by side, and under them where, with what, how often and by which command they were measured."""
    lines = ["| | ours | peer | theirs | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = [_number(row[key], row["unit"]) for key in ("ours", "theirs")]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        lines.append(f"| {row['row']} | {numbers[0]} | {row['peer']} | {numbers[1]} | {ratio} |")
    machines = "; ".join(dict.fromkeys(f"{row['machine']}, torch {row['versions']['torch']}" for row in rows))
    times = sorted({row["n"] for row in rows if row["n"]})
    n = f"n = {times[0]}" + (f" to {times[-1]}" if len(times) > 1 else "") if times else ""
    how = ", ".join(filter(None, [machines, n, f"`lightning-cnn bench {name}`"]))
    return "\n".join([*lines, "", f"{how}. A ratio above 1 is in our favour.", ""])


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{shown} {unit}".rstrip()
