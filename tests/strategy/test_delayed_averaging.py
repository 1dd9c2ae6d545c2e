"""DelayedAveraging's own knobs; sampling, equal ends and errors are in the contract."""

import os

import pytest
import torch

from lightning_cnn.errors import ConfigurationError, NoEffectWarning
from lightning_cnn.strategy import DelayedAveraging


def test_all_wrong_arguments_are_named_at_once():
    with pytest.raises(ConfigurationError, match=r"(?s)2 problems.*every.*timeout_s"):
        DelayedAveraging(every=0, timeout_s=-1)


def test_one_process_is_told_that_nothing_changes():
    from training_job import Options, run

    with pytest.warns(NoEffectWarning, match="one process"):
        _, module = run(Options(ranks=1, epochs=1, samples=16), DelayedAveraging())
    torch.set_default_dtype(torch.float32)
    assert "LIGHTNING_CNN_LAUNCHER" not in os.environ  # or what this process starts later would take itself for an orphan
    assert sorted(i for batch in module.seen for i in batch) == list(range(16))


def test_rarer_rounds_and_an_epoch_in_single_precision(job):
    """every=4 makes fewer rounds; a checkpoint between epochs resumes on another number of ranks."""
    common = {"strategy": "delayed_averaging", "double": False, "shuffle": True, "batch": 2, "optimizer": "momentum"}
    done = job({**common, "save_epoch": True}, {**common, "kwargs": {"every": 4}}).wait()
    assert done.process.returncode == 0, done.output
    often, rarely = (done[n][0]["report"] for n in (0, 1))
    assert rarely["rounds"] < often["rounds"]
    assert done[1][0]["metrics"]["val_acc"] >= 0.8
    from training_job import Options, run

    run_alone = Options(ranks=1, batch=2, double=False, optimizer="momentum", resume=str(done.out / "epoch=0.ckpt"), out=str(done.out))
    trainer, module = run(run_alone, "auto")
    assert len(module.seen) == 32
    assert trainer.current_epoch == 2
