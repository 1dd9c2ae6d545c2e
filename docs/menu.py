#!/usr/bin/env python3
"""Write the README's menu from the cards: python docs/menu.py [--check]"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "callbacks": "callbacks=[...]",
    "conv": "callbacks=[ConvAlgorithm(...)]",
    "data": "datamodule=",
    "precision": "plugins=[...]",
    "strategy": "strategy=",
    "model": "fit(model)",
    "checkpoint": "plugins=[...]",
}
MARKS = "<!-- menu -->", "<!-- /menu -->"


def gist(card: Path) -> tuple[str, str]:
    """A card's title and the first sentence under it."""
    text = card.read_text()
    title = re.match(r"# (.+)", text)
    paragraph = re.search(r"^# .+\n+((?:[^\n#|].*\n)+)", text)
    if not title or not paragraph:
        sys.exit(f"{card}: a card begins with '# Name' and a paragraph that says what it is")
    sentence = re.split(r"(?<=[.:])\s", " ".join(paragraph[1].split()), maxsplit=1)[0]
    return title[1].strip("`"), sentence.rstrip(":") + ("." if sentence.endswith(":") else "")


def menu() -> str:
    lines = []
    for kind, argument in KINDS.items():
        lines += [f"**{kind}** (`{argument}`)", ""]
        for card in sorted((ROOT / "lightning_cnn" / kind).glob("*.md")):
            title, sentence = gist(card)
            lines.append(f"- [{title}](lightning_cnn/{kind}/{card.name}): {sentence}")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    wanted = f"{before}{MARKS[0]}\n\n{menu()}\n{MARKS[1]}{after}"
    if "--check" in sys.argv:
        return int(wanted != readme.read_text())
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
