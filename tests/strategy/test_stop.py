"""SIGTERM to any rank ends all in good order with a checkpoint, from which another number of ranks goes on inside the epoch."""

import os

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from training_job import Options, digest, run

from lightning_cnn.strategy._stop import save_and_stop

SAMPLES, EPOCHS = 96, 3
COMMON = {"samples": SAMPLES, "epochs": EPOCHS, "loader": "lane", "shuffle": True, "sleep_s": 0.01, "optimizer": "momentum", "batch": 4}
ALL = ["sync_ddp", "local_sgd", "one_weird_trick", "delayed_averaging", "async_sgd"]


@pytest.fixture(scope="module", params=[name if name == "async_sgd" else pytest.param(name, marks=pytest.mark.soak) for name in ALL])
def interrupted(request, launch, tmp_path_factory):
    """A job of two ranks, the second of which gets a SIGTERM in the second of three epochs."""
    out = tmp_path_factory.mktemp(request.param)
    run = {"strategy": request.param, "term_rank": 1, "term_step": 17, "save_epoch": True, **COMMON}
    return request.param, launch(out, run).wait()


def test_nothing_is_written_when_the_user_turned_that_off(tmp_path, caplog):
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, logger=False)
    with pytest.raises(SIGTERMException):
        save_and_stop(trainer)
    assert not list(tmp_path.iterdir())
    assert "nothing was saved, because the Trainer has enable_checkpointing=False" in caplog.text


def seen(ranks):
    return [sample for rank in ranks.values() for batch in rank["seen"] for sample in batch]


def test_a_sigterm_to_one_rank_stops_all_and_saves(interrupted):
    _, job = interrupted
    assert (job.out / "sigterm.ckpt").exists(), job.output
    assert job.process.returncode == 0, job.output
    assert [job[0][rank]["error"] for rank in (0, 1)] == ["SIGTERMException"] * 2
    assert job.gone()
    assert SAMPLES < len(seen(job[0])) < 2 * SAMPLES, "in the second epoch"


def test_another_number_of_ranks_goes_on_inside_the_epoch(interrupted, launch, tmp_path):
    """Nothing is seen twice, and nothing is left out. In step the global batch stays what it was: four ranks of half the batch."""
    name, job = interrupted
    ranks, batch = (3, 4) if name in ("async_sgd", "delayed_averaging") else (4, 2)
    options = {**COMMON, "strategy": name, "ranks": ranks, "batch": batch, "resume": str(job.out / "sigterm.ckpt")}
    resumed = launch(tmp_path, options).wait()
    assert resumed.process.returncode == 0, resumed.output
    assert sorted(seen(job[0]) + seen(resumed[0])) == sorted(list(range(SAMPLES)) * EPOCHS)
    assert all(rank["weights"] == resumed[0][0]["weights"] for rank in resumed[0].values())
    assert resumed[0][0]["metrics"]["val_acc"] >= 0.9
    if name == "sync_ddp":  # float64: what differs from one process without interruption is the order of a sum
        _, whole = run(Options(**{**COMMON, "ranks": 1, "batch": 8, "sleep_s": 0, "out": os.devnull}), "auto")
        assert resumed[0][0]["weights"] == pytest.approx(digest(whole), abs=1e-12)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "term_step"), [("spatial", 17), ("pipeline", 90)])  # a pipeline runs training_step six times a batch
def test_one_process_goes_on_where_two_with_one_model_stopped(name, term_step, job, tmp_path):
    """float64: interrupted in the second epoch and resumed, its weights are those of a run of one process without interruption."""
    options = {**COMMON, "batch": 8, "sleep_s": 0.0}
    done = job(
        {
            "strategy": name,
            "term_rank": 1,
            "term_step": term_step,
            **options,
            "sleep_s": 0.005,
            "save_epoch": True,
        }
    ).wait()
    assert done.process.returncode == 0, done.output
    assert [done[0][rank]["error"] for rank in (0, 1)] == ["SIGTERMException"] * 2
    assert done.gone()
    _, resumed = run(Options(**{**options, "ranks": 1, "out": str(done.out), "resume": str(done.out / "sigterm.ckpt")}), "auto")
    _, whole = run(Options(**{**options, "ranks": 1, "out": os.devnull}), "auto")
    torch.set_default_dtype(torch.float32)
    assert digest(resumed) == pytest.approx(digest(whole), abs=1e-12)
