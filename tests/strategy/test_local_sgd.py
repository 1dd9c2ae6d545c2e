"""LocalSGD: what a period changes; that period=1 is synchronous data parallelism is in the contract."""

import pytest
from lightning.pytorch import Trainer
from torch import nn

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.strategy import LocalSGD, diagnose


def test_all_wrong_arguments_are_named_at_once():
    with pytest.raises(ConfigurationError, match=r"(?s)3 problems.*period.*warmup_steps.*timeout_s"):
        LocalSGD(period=0, warmup_steps=-1, timeout_s=0)


def test_synchronised_batchnorm_is_refused():
    from training_job import Classifier, Options

    module = Classifier(Options())
    module.norm = nn.BatchNorm2d(4)
    found = diagnose(Trainer(accelerator="cpu", devices=2, strategy=LocalSGD(), sync_batchnorm=True), module)
    assert "drop sync_batchnorm" in found.problems[0]


def test_a_period_longer_than_the_epoch_averages_once_an_epoch_and_warm_up_every_step(job):
    common = {"strategy": "local_sgd", "epochs": 2, "batch": 4}
    long, warm, each = ({**common, "kwargs": k} for k in ({"period": 100}, {"period": 100, "warmup_steps": 99}, {"period": 1}))
    done = job(long, warm, each).wait()
    assert done.process.returncode == 0, done.output
    assert done[0][0]["weights"] == done[0][1]["weights"]
    assert done[1][0]["weights"] == pytest.approx(done[2][0]["weights"], abs=1e-12)
    assert done[0][0]["weights"] != pytest.approx(done[2][0]["weights"], abs=1e-6)
