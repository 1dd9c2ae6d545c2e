"""One address: a plugin has its code, card, menu entry and test under the same name in every tree."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
KINDS = ("callbacks", "checkpoint", "conv", "data", "model", "precision", "strategy")
PLUGINS = [(kind, path.stem) for kind in KINDS for path in sorted((ROOT / "lightning_cnn" / kind).glob("*.py")) if path.stem[0] != "_"]
SECTIONS = ("## Use", "## Price", "## When not to use it", "## Source")


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_everything_stands_at_its_address(kind, name):
    places = (f"lightning_cnn/{kind}/{name}.md", f"conf/{kind}/{name}.yaml", f"tests/{kind}/test_{name}.py")
    missing = [place for place in places if not (ROOT / place).exists()]
    assert not missing


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_a_card_has_its_sections(kind, name):
    card = (ROOT / "lightning_cnn" / kind / f"{name}.md").read_text()
    assert [section for section in SECTIONS if section not in card] == []


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_menu_entry_is_readable_yaml(path):
    yaml.safe_load(path.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_no_card_is_left_without_its_plugin(kind):
    names = {name for k, name in PLUGINS if k == kind}
    assert {path.stem for path in (ROOT / "lightning_cnn" / kind).glob("*.md")} <= names
