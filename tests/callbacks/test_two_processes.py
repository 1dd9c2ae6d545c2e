"""Freezing, rates by stage, averaging and caching on two processes."""

import torch
from _transfer import run_two_processes

SCRIPT = """
import sys, warnings, torch
warnings.filterwarnings("ignore")
sys.path.insert(0, {tests!r})
import lightning as L
from torch import nn
from _transfer import QUIET, Module, loader
from lightning_cnn.callbacks import EMA, DiscriminativeLR, FeatureCache, GradualUnfreezing

class Plain(nn.Sequential):  # no batch norm behind the prefix, whose statistics would be those of half a batch
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

def train(out, *more):
    module = Module(net=Plain(), momentum=0.9)
    callbacks = [GradualUnfreezing(every=2, up_to=2), DiscriminativeLR(), EMA(decay=0.5), *more]
    trainer = L.Trainer(max_epochs=4, callbacks=callbacks, devices=2, strategy="ddp_find_unused_parameters_true", **QUIET)
    trainer.fit(module, loader(32, 8))
    torch.save({{name: tensor.cpu() for name, tensor in module.state_dict().items()}}, f"{{out}}/{{len(more)}}.{{trainer.global_rank}}")

if __name__ == "__main__":
    train(sys.argv[1])
    train(sys.argv[1], FeatureCache(folder=sys.argv[1] + "/features"))
"""


def test_two_processes_agree_and_caching_in_a_common_folder_changes_no_bit(tmp_path):
    """One process is no reference: Lightning shuffles training data that it distributes."""
    run_two_processes(SCRIPT, tmp_path)
    plain, also_plain, cached, also_cached = (
        torch.load(tmp_path / f"{which}.{rank}", weights_only=True) for which in (0, 1) for rank in (0, 1)
    )
    for name, tensor in plain.items():
        for other in (also_plain, cached, also_cached):
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=0)
