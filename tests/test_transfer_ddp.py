"""Freezing, rates by stage, averaging and caching on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import sys, warnings, torch
warnings.filterwarnings("ignore")
sys.path.insert(0, {tests!r})
import lightning as L
from torch import nn
from torch.utils.data import DataLoader
from _transfer import QUIET, Module, loader
from lightning_cnn.callbacks import EMA, DiscriminativeLR, FeatureCache, GradualUnfreezing

class Plain(nn.Sequential):  # no batch norm behind the prefix, whose statistics would be those of half a batch
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

if __name__ == "__main__":
    out, cached, devices = sys.argv[1], sys.argv[2] == "cached", int(sys.argv[3])
    module = Module(net=Plain(), momentum=0.9)
    callbacks = [GradualUnfreezing(every=2, up_to=2), DiscriminativeLR(), EMA(decay=0.5)]
    callbacks += [FeatureCache(folder=out + ".d")] if cached else []
    trainer = L.Trainer(max_epochs=4, callbacks=callbacks, devices=devices,
                        strategy="ddp_find_unused_parameters_true" if devices > 1 else "auto", **QUIET)
    trainer.fit(module, loader(32, 16 // devices))
    torch.save({{name: tensor.cpu() for name, tensor in module.state_dict().items()}}, f"{{out}}.{{trainer.global_rank}}")
"""


def run(folder: Path, name: str, devices: int) -> list[dict]:
    script = folder / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PL_TORCH_DISTRIBUTED_BACKEND": "gloo"}
    command = [sys.executable, str(script), str(folder / f"{name}{devices}"), name, str(devices)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{name}{devices}.{rank}", weights_only=True) for rank in range(devices)]


def test_two_processes_agree_and_caching_changes_no_bit(tmp_path):
    """One process is no reference: Lightning shuffles training data that it distributes."""
    first, second = run(tmp_path, "plain", 2)
    cached, also_cached = run(tmp_path, "cached", 2)
    for name in first:
        for other in (second, cached, also_cached):
            torch.testing.assert_close(other[name], first[name], rtol=0, atol=0)
