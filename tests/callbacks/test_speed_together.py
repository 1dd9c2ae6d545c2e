"""FastTraining, BottleneckMonitor and LeanLogging in one run: on two processes, and compiled."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_cnn.callbacks import BottleneckMonitor, FastTraining, LeanLogging, _trials

sys.path.insert(0, str(Path(__file__).parents[1]))
from _transfer import QUIET, Module, loader, run_two_processes

SCRIPT = """
import sys, warnings, torch
warnings.filterwarnings("ignore")
sys.path.insert(0, {tests!r})
import lightning as L
from lightning.pytorch.loggers import CSVLogger
from _transfer import QUIET, Module, loader
from lightning_cnn.callbacks import BottleneckMonitor, FastTraining, LeanLogging, fast_training

class Watched(Module):
    def training_step(self, batch, batch_idx):
        weight, group = self.model.stem[0].weight, self.optimizers().param_groups[0]
        self.seen = [weight.is_contiguous(memory_format=torch.channels_last), bool(group.get("fused"))]
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

def train(out, *callbacks):
    module = Watched(momentum=0.9, lr=0.001)
    options = {{**QUIET, "logger": CSVLogger(out, name="", version=str(len(callbacks)))}}
    trainer = L.Trainer(max_epochs=1, callbacks=list(callbacks), devices=2, strategy="ddp", log_every_n_steps=2, **options)
    trainer.fit(module, loader(64, 4))
    kept = {{"weights": dict(module.state_dict()), "seen": module.seen}}
    torch.save(kept, f"{{out}}/{{len(callbacks)}}.{{trainer.global_rank}}")
    return trainer.global_rank

def chosen(changes, *rest):  # each rank finds something else; rank 1 would not even try what rank 0 keeps
    mine = ["fused"] if rank == 0 else []
    return [], {{change.name: change.apply() for change in changes if change.name in mine}}

if __name__ == "__main__":
    rank = train(sys.argv[1])
    fast_training.choose = chosen
    if rank == 1:
        fast_training._changes.can_be_fused = lambda optimizer: False
    too_late, monitor = FastTraining(switches=["channels_last"]), BottleneckMonitor()
    too_late.load_state_dict({{"kept": ["channels_last"]}})
    train(sys.argv[1], too_late)
    assert "too late: DDP" in str(too_late.trials[0]), too_late.trials
    train(sys.argv[1], FastTraining(), monitor, LeanLogging())
    assert monitor.report.steps == 6 and monitor.report.measured.images == 4, monitor.report
"""


def test_rank_0_decides_and_two_processes_end_with_the_weights_and_the_log_of_a_plain_run(tmp_path):
    run_two_processes(SCRIPT, tmp_path)
    plain, late, fast, also_fast = (torch.load(tmp_path / name, weights_only=True) for name in ("0.0", "1.0", "3.0", "3.1"))
    assert late["seen"] == [False, False]
    assert fast["seen"] == also_fast["seen"] == [False, True]
    for name, tensor in fast["weights"].items():
        assert torch.equal(late["weights"][name], plain["weights"][name])
        if "running" not in name:  # the statistics of batch norm are each rank's own
            assert torch.equal(also_fast["weights"][name], tensor), name
        torch.testing.assert_close(tensor, plain["weights"][name], rtol=1e-4, atol=1e-5)
    assert (tmp_path / "3" / "bottlenecks.txt").exists()
    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "0"), rel=1e-4)


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        found = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]}
    assert list(found) == [1, 3, 5, 7]
    return found


def test_a_compiled_run_ends_with_the_weights_of_a_plain_one_and_its_look_is_spared(monkeypatch):
    """The trial compiles and runs the network for good; only its seconds are said by the test."""
    modules = []

    def timed(step, device, repeats=3):
        step()
        return [0.5 if any(part._compiled_call_impl is not None for part in modules[-1].children()) else 1.0]

    def trained(*callbacks):
        torch.manual_seed(0)
        modules.append(Module(net=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))))
        Trainer(max_epochs=1, callbacks=list(callbacks), **QUIET).fit(modules[-1], loader(32, 8))
        return modules[-1]

    monkeypatch.setattr(_trials, "timed", timed)
    plain, fast, monitor = trained(), FastTraining(switches=["compile"], compile=True, trial_share=math.inf), BottleneckMonitor()
    compiled = trained(fast, monitor, LeanLogging())
    assert fast.trials[0].kept, fast.trials
    assert compiled.model._compiled_call_impl is None
    assert monitor.report.steps == 2 and monitor.report.measured.operations == 0
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
