"""`ExactResume`: the same bits after any interruption, and a signal that loses no step."""

import os
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from reliability import _job as job
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.callbacks import ExactResume
from lightning_cnn.checkpoint import load
from lightning_cnn.errors import CheckpointError, ConfigurationError


@pytest.mark.parametrize(
    ("options", "batches"),
    [({}, (7, 16)), ({"accumulate": 3}, (7, 32)), ({"rounding": True}, (17,))],
    ids=["each batch a step", "while gradients accumulate", "stochastic rounding"],
)
def test_a_run_resumed_at_a_batch_goes_on_in_the_same_bits(options, batches, tmp_path):
    whole = job.train(job.SaveEveryBatch(tmp_path), **options)
    for batch in batches:
        resumed = job.train(resume=tmp_path / f"{batch}.ckpt", **options)
        assert resumed.losses == whole.losses[batch:]
        assert job.same(whole, resumed)


def test_other_worker_counts_go_on_in_the_same_bits(tmp_path):
    whole = job.train(job.SaveEveryBatch(tmp_path), workers=2)
    assert job.train(resume=tmp_path / "30.ckpt", workers=1).losses == whole.losses[30:]


def test_without_it_the_same_run_does_not(tmp_path):
    """So that the tests above say something: the global generators are not where they were."""
    whole = job.train(job.SaveEveryBatch(tmp_path), max_epochs=1)
    callbacks = [ExactResume(seed=1)]
    checkpoint = load(tmp_path / "7.ckpt")
    checkpoint["exact_resume"]["seed"] = 1
    torch.save(checkpoint, tmp_path / "other.ckpt")
    model = job.Net()
    options = {**job.QUIET, "max_epochs": 1, "enable_checkpointing": False, "callbacks": callbacks}
    Trainer(**options).fit(model, job.Resumable(job.Noisy(), batch_size=4), ckpt_path=tmp_path / "other.ckpt", weights_only=True)
    assert model.losses != whole.losses[7:]


@pytest.mark.forks
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_finishes_the_step_saves_and_exits_as_a_program_should(name, tmp_path):
    number, count = getattr(signal, name), tmp_path / "count"
    whole = job.train()
    process = job.forked(lambda: job.train(job.Count(count, 0.01), saver=job.last_saver(tmp_path, every=1000)))
    seen = signalled(process, number, count, 5)
    assert job.ended(process) == 128 + number
    step = load(tmp_path / "last.ckpt")["global_step"]
    assert seen <= step <= seen + 10
    resumed = job.train(resume=tmp_path / "last.ckpt")
    assert resumed.losses == whole.losses[step:]
    assert job.same(whole, resumed)


def signalled(process, number, count, after):
    while not count.exists() or int(count.read_text() or 0) < after:
        time.sleep(0.005)
    seen = int(count.read_text() or 0)
    os.kill(process, number)
    return seen


@pytest.mark.forks
def test_two_processes_stop_after_the_same_step_when_one_is_told(tmp_path):
    """And what they resume, while gradients accumulate too, ends in the bits of two processes that were never stopped."""
    count = tmp_path / "count"

    def work(*callbacks, resume=None, name=""):
        model = job.train(
            *callbacks, resume=resume, accumulate=2, devices=2, strategy="ddp", saver=job.last_saver(tmp_path / "ck", every=1000)
        )
        torch.save({"losses": model.losses, "state": model.state_dict()}, tmp_path / f"{name}{os.environ['RANK']}.pt")

    def pair(*arguments, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0"}
        shared |= {"LOCAL_WORLD_SIZE": "2"}
        ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
        return [job.forked(lambda: work(*arguments, **options), environment) for environment in ranks]

    assert [job.ended(process) for process in pair(name="whole")] == [0, 0]
    stopped = pair(job.Count(count, 0.02))
    signalled(stopped[1], signal.SIGTERM, count, 3)
    assert [job.ended(process) for process in stopped] == [143, 143]
    assert 3 <= load(tmp_path / "ck" / "last.ckpt")["global_step"] < 12
    assert [job.ended(process) for process in pair(resume=tmp_path / "ck" / "last.ckpt", name="resumed")] == [0, 0]
    for rank in (0, 1):
        whole, resumed = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for name in ("whole", "resumed"))
        assert 0 < len(resumed["losses"]) < len(whole["losses"])
        assert whole["losses"][-len(resumed["losses"]) :] == resumed["losses"]
        if rank == 0:  # running statistics are local, and a checkpoint holds those of rank 0, which all normalise by
            assert all(torch.equal(whole["state"][key], value) for key, value in resumed["state"].items())


@pytest.mark.forks
def test_a_slurm_job_is_requeued_after_it_has_been_saved(tmp_path, monkeypatch):
    stub = tmp_path / "scontrol"
    stub.write_text(f'#!/bin/sh\necho "$@" $(ls {tmp_path}/last.ckpt) > {tmp_path}/asked\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    process = job.forked(
        lambda: (os.environ.update(SLURM_JOB_ID="17"), job.train(job.Count(tmp_path / "n", 0.01), saver=job.last_saver(tmp_path, 1000)))
    )
    signalled(process, signal.SIGUSR1, tmp_path / "n", 3)
    assert job.ended(process) == 128 + signal.SIGUSR1
    assert (tmp_path / "asked").read_text().split() == ["requeue", "17", str(tmp_path / "last.ckpt")]


def test_what_cannot_be_exact_is_refused_before_the_first_step(tmp_path):
    loader = DataLoader(TensorDataset(torch.rand(8, 3, 8, 8), torch.zeros(8).long()), batch_size=4, shuffle=True)
    with pytest.raises(ConfigurationError, match=r"loader DataLoader has no position .*\.data\.Resumable\(dataset"):
        Trainer(**job.QUIET, enable_checkpointing=False, callbacks=[ExactResume()]).fit(job.Net(), loader)
    with pytest.raises(ConfigurationError, match="'SIGHUP' is not one of"):
        job.train(ExactResume(signals=["SIGHUP"]))
    job.train(job.SaveEveryBatch(tmp_path), max_epochs=1)
    with pytest.raises(CheckpointError, match=r"started with ExactResume\(seed=0\)"):
        options = {**job.QUIET, "enable_checkpointing": False, "callbacks": [ExactResume(seed=1)]}
        trainer = Trainer(**options)
        trainer.fit(job.Net(), job.Resumable(job.Noisy(), batch_size=4), ckpt_path=tmp_path / "3.ckpt", weights_only=True)


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    job.train(max_epochs=1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_processes_that_see_the_same_batches_draw_the_same_numbers():
    """Where the picture or the model is divided instead of the batch, noise that differed would be cut off at the seams."""

    def drawn(rank, share):
        trainer = SimpleNamespace(current_epoch=0, global_rank=rank, distributed_sampler_kwargs={"num_replicas": 2, "rank": share})
        with torch.random.fork_rng():
            ExactResume()._seed(trainer, "step")
            return torch.rand(3).tolist()

    assert drawn(rank=0, share=0) == drawn(rank=1, share=0) != drawn(rank=1, share=1)
