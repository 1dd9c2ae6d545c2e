"""What the README and the cards show is run: Python as it stands, commands composed and checked argument by argument."""

import re
import shlex
from pathlib import Path

import pytest

from lightning_cnn.app import _check

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "lightning_cnn").rglob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for number, match in enumerate(FENCE.finditer(page.read_text())):
            if match[1] == language and "no-run" not in match[2]:
                found.append(pytest.param(match[3], id=f"{page.relative_to(ROOT)}:{number}"))
    return found


def commands() -> list:
    found = []
    for block in blocks("bash"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            command = re.match(r"\s*(?:lightning-cnn|python3 run\.py|python -m lightning_cnn)\s+(\w+.*)", line.split("#")[0])
            if command and not command[1].startswith(("test", "setup", "bench")):
                found.append(pytest.param(command[1], id=f"{block.id} {command[1][:50]}"))
    return found


@pytest.mark.parametrize("source", blocks("python"))
def test_python_runs_as_it_stands(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("command", commands())
def test_a_command_composes_and_every_argument_it_names_exists(command):
    verb, *words = shlex.split(command)
    _check.composition(verb, [word for word in words if word not in ("-m", "--multirun")])


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT / "conf")))
def test_every_menu_entry_composes_and_its_arguments_exist(path):
    group = path.parent.relative_to(ROOT / "conf").as_posix()
    if group == ".":
        if path.stem != "base":
            _check.composition(path.stem, [])
        return
    option = f"[default,{path.stem}]" if group == "callbacks" else path.stem
    words = [f"{group}={option}"]
    text = path.read_text()
    if group == "augment" and path.stem != "none":
        words.append("callbacks=[default,batch_augmentation]")
    for key in re.findall(r"^(\w+): \?\?\?", text, re.MULTILINE):
        if path.stem not in NEEDS:
            words.append(f"{group}.{key}=x")
    words += NEEDS.get(path.stem, [])
    _check.composition("train", words)


# What has no default: your own pictures, and checkpoints to average.
NEEDS = {name: ["data.root=x"] for name in ("transfer", "decaf", "few_shot")}
NEEDS |= {"model_soup": ["callbacks.model_soup.members=[x]"]}
