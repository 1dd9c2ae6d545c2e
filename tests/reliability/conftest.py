"""The figures of docs/reliability.md are written by the run that measured them (`pytest -m soak tests/reliability`)."""

from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
MARK = "<!-- figures -->"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture
def figure(request):
    """Call with what was tried, how often, and what came of it; the long run alone is written down."""

    def write(what: str, tried: int | str, result: str) -> None:
        if request.node.get_closest_marker("soak") is None:
            return
        before, rows, after = PAGE.read_text().split(MARK)
        kept = [row for row in rows.strip().splitlines() if not row.startswith(f"| {what} |")]
        row = f"| {what} | {tried:,} | {result} |" if isinstance(tried, int) else f"| {what} | {tried} | {result} |"
        PAGE.write_text(f"{before}{MARK}\n" + "\n".join([*kept, row]) + f"\n{MARK}{after}")

    return write
