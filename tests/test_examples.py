"""Every recipe runs at a small size, as a file and as an experiment, and has its twin and its header."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_cnn.app.main import main
from lightning_cnn.data import pack

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml") if path.stem != "default")
SHORT = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
# A recipe's own small size, in the place of the Trainer's limits; and what an experiment on your pictures has no default for.
SMALL = {
    "decaf": ["data.root=FOLDER", "data.size_px=32", "model.architecture=small_cnn", "model.weights=null"],
    "few_shot": [
        "data.root=FOLDER",
        "data.size_px=32",
        "data.shots=2",
        "model.architecture=small_cnn",
        "model.weights=null",
        "callbacks.feature_cache=null",
        *SHORT,
    ],
    "digits": ["recipe.seeds=2", "recipe.epochs=1", "recipe.views=2", "recipe.pretraining_epochs=1"],
    "swap_convolutions": ["data.size_px=16", "model.architecture=small_cnn", "callbacks.conv.cache=null", *SHORT],
    "transfer": ["data.root=FOLDER", "data.size_px=32", "model.architecture=small_cnn", "model.weights=null", *SHORT],
    "pipeline_spatial": ["data.size_px=8", "trainer.devices=1", *SHORT],  # two processes are for tests/strategy, outside pytest's own
    "pack_once": ["data.train=PACKED", "data.val=PACKED", "model.architecture=small_cnn", *SHORT],
}
ALONE = ("devices=", "num_nodes", "spawn")  # starts processes of its own: not from inside pytest


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_a_recipe_runs_when_asked_to_be_quick(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if any(word in path.read_text() for word in ALONE):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, path, "--quick"], capture_output=True, text=True, env=env, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        monkeypatch.setattr(sys, "argv", [str(path), "--quick"])
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_a_recipe_is_short_and_says_what_it_measured(path):
    text = path.read_text()
    header = text.split('"""')[1]
    assert len(text.splitlines()) <= 60
    assert re.search(r"^Result: .*\d", header, re.MULTILINE), "the header needs a line 'Result: ...' with a measured number"
    assert f"python examples/{path.name}" in header


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_at_a_small_size(name, tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("FOLDER", str(pictures)).replace("PACKED", str(tmp_path / "x.pack")) for word in SMALL.get(name, SHORT)]
    if name == "pack_once":
        pack(pictures, tmp_path / "x.pack", size=32, workers=0, progress=False)
    words = ["train", f"experiment={name}", "trainer.accelerator=cpu", *words]
    if "devices: 2" in (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text():  # starts a process of its own
        done = subprocess.run([sys.executable, "-m", "lightning_cnn", *words], capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert main(words) == 0
    assert list(tmp_path.glob("outputs/train/*/report.md"))
