"""OneWeirdTrick's own promises; that n processes equal one under plain SGD is in the contract."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from training_job import Classifier, Options, digest, run

from lightning_cnn.errors import ConfigurationError, DataError
from lightning_cnn.strategy import OneWeirdTrick, diagnose
from lightning_cnn.strategy.one_weird_trick import shared_layers

TRAINER = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}


def test_clipping_accumulation_adamw_and_checkpoints_are_those_of_one_process(job, tmp_path):
    """float64; an epoch in one process, then one more in two from its checkpoint; and what two save, one can load."""
    common = {"optimizer": "adamw", "trainer": TRAINER, "save_epoch": True}
    try:
        run(Options(ranks=1, batch=8, epochs=1, out=str(tmp_path / "one"), **common), "auto")
        resume = {"resume": str(tmp_path / "one" / "epoch=0.ckpt"), "epochs": 2}
        _, alone = run(Options(ranks=1, batch=8, out=str(tmp_path / "one"), **common, **resume), "auto")
    finally:
        torch.set_default_dtype(torch.float32)
    done = job({"strategy": "one_weird_trick", "batch": 4, "afterwards": True, **common, **resume}).wait()
    assert done.process.returncode == 0, done.output
    for rank in (0, 1):
        assert done[0][rank]["weights"] == pytest.approx(digest(alone), abs=1e-12)
        assert done[0][rank]["plain"], "whole again, for whoever uses the model after the Trainer"
    saved, later = (torch.load(tmp_path / name, weights_only=True) for name in ("epoch=1.ckpt", "afterwards.ckpt"))
    torch.testing.assert_close(later["state_dict"], saved["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(later["optimizer_states"][0]["state"], saved["optimizer_states"][0]["state"], rtol=0, atol=0)
    model = Classifier(Options()).double()
    model.load_state_dict(saved["state_dict"])
    assert digest(model) == pytest.approx(digest(alone), abs=1e-12)
    theirs = torch.load(tmp_path / "one" / "epoch=1.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    ours = saved["optimizer_states"][0]["state"]
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[k]["exp_avg"], theirs[k]["exp_avg"], rtol=0, atol=1e-12) for k in theirs)


def test_batches_of_different_sizes_train_as_under_ddp(job):
    """61 samples: the last batches have 3 and 2; float64, a mean over the ranks' means."""
    common = {"samples": 61, "loader": "lane", "shuffle": True, "optimizer": "momentum"}
    done = job(*({"strategy": name, **common} for name in ("sync_ddp", "one_weird_trick"))).wait()
    assert done.process.returncode == 0, done.output
    assert {len(batch) for batch in done[1][0]["seen"]} != {len(batch) for batch in done[1][1]["seen"]}
    for rank in (0, 1):
        assert done[1][rank]["weights"] == pytest.approx(done[0][rank]["weights"], abs=1e-12)


def test_rows_that_are_no_samples_cannot_be_evened_out():
    strategy = OneWeirdTrick()
    strategy._samples, strategy._least, strategy._most = 3, 2, 3
    with pytest.raises(DataError, match=r"2 to 3, but a fully connected layer has 12 rows"):
        strategy._fill(nn.Linear(4, 4), (torch.zeros(12, 4),))


def test_every_linear_layer_with_enough_outputs_is_shared():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 7), nn.Linear(7, 1))
    assert shared_layers(net, 2) == ["1"]


def test_the_doctor_says_what_cannot_be_divided():
    class Bad(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    found = diagnose(Trainer(accelerator="cpu", devices=2, strategy=OneWeirdTrick()), Bad())
    assert "automatic_optimization" in found.problems[0]
    assert "no nn.Linear" in found.problems[1]
    assert "BatchNorm (net.1" in found.advice[0]


def test_a_wrong_argument_is_named():
    with pytest.raises(ConfigurationError, match="timeout_s must be positive"):
        OneWeirdTrick(timeout_s=0)
