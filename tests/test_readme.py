"""The README's menu is what the cards say, and it stays one screen of prose."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_menu_is_generated_from_the_cards():
    command = [sys.executable, ROOT / "docs" / "menu.py", "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run: python docs/menu.py"
