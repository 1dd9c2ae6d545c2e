"""SyncDDP's own knobs; that n processes equal one is in the contract."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.scaling import lr_factor
from lightning_cnn.strategy import SyncDDP, diagnose
from lightning_cnn.strategy.sync_ddp import scaled_lr


def test_the_learning_rate_is_scaled_during_the_step_only():
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.2)]
    optimizer = torch.optim.SGD(groups)
    with scaled_lr(optimizer, lr_factor(4, "linear")):
        assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.8]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_the_learning_rate_is_restored_after_a_failing_step():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ZeroDivisionError), scaled_lr(optimizer, 4.0):
        raise ZeroDivisionError
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_all_wrong_arguments_are_named_at_once():
    with pytest.raises(ConfigurationError, match=r"(?s)3 problems.*compression.*scale_lr.*find_unused"):
        SyncDDP(compression="zip", scale_lr="cube", static_graph=True, find_unused_parameters=True)


def test_the_doctor_knows_batchnorm_and_backends():
    from training_job import Classifier, Options

    module = Classifier(Options())
    module.norm = nn.BatchNorm2d(4)
    found = diagnose(Trainer(accelerator="cpu", devices=2, strategy=SyncDDP(process_group_backend="nccl")), module)
    assert "nccl" in found.problems[0]
    assert "sync_batchnorm=True" in found.advice[0]
    assert diagnose(Trainer(accelerator="cpu", devices=2, strategy=SyncDDP(), sync_batchnorm=True), module).advice == []


def test_every_compression_learns_and_keeps_the_ranks_equal(job):
    """fp16, bf16 and PowerSGD on gloo, where Lightning's DDP would silently send float32; and a scaled learning rate."""
    common = {"strategy": "sync_ddp", "double": False, "epochs": 3, "shuffle": True, "batch": 4}
    table = [{**common, "kwargs": {"compression": c}} for c in ("fp16", "bf16", "powersgd")]
    done = job(*table, {**common, "kwargs": {"scale_lr": "linear", "static_graph": True}}, {**common}).wait()
    assert done.process.returncode == 0, done.output
    weights = [done[n][0]["weights"] for n in range(5)]
    for n in range(5):
        assert done[n][1]["weights"] == weights[n]
        assert done[n][0]["metrics"]["val_acc"] >= 0.8
    plain = torch.tensor(weights[4])
    errors = [float((torch.tensor(w) - plain).norm() / plain.norm()) for w in weights]
    assert 0 < errors[0] < 1e-3 < 2e-2 < errors[3], "fp16 is close to float32; twice the learning rate is not"
    assert errors[0] < errors[1] < 1e-2
    assert 0 < errors[2] < 0.2
