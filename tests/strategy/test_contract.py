"""What every strategy promises, from one table.

Synchronous: n processes take the steps of one process with the same global batch. Asynchronous: each sample once an epoch, staleness
reported, nothing lost between pushed and applied. All: a killed worker is survived or gives a typed error that names it within 10 s,
and no process is left behind.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_job import Options, digest, run

from lightning_cnn.strategy._names import NAMES

SAMPLES, EPOCHS = 64, 2
SYNC = {"sync_ddp": {}, "local_sgd": {"period": 1}, "one_weird_trick": {}}
DIVIDED = {"spatial": {}, "pipeline": {}}  # all processes hold one model together and see the same batches
ASYNC = {"delayed_averaging": {}, "async_sgd": {}}
SURVIVES = {"async_sgd": {}}
ALL = {**SYNC, **DIVIDED, **ASYNC, **SURVIVES}


@pytest.fixture(scope="module")
def runs(launch, tmp_path_factory):
    """Every strategy once, in one pair of processes; rank 1 is three times slower for the asynchronous ones."""
    table = [{"strategy": name, "kwargs": kwargs, "batch": 4} for name, kwargs in SYNC.items()]
    table += [{"strategy": name, "kwargs": kwargs, "batch": 8, "loader": "same"} for name, kwargs in DIVIDED.items()]
    table += [
        {"strategy": name, "kwargs": kwargs, "batch": 2, "sleep_s": 0.004, "slow_rank": 1, "shuffle": True, "optimizer": "momentum"}
        for name, kwargs in ASYNC.items()
    ]
    job = launch(tmp_path_factory.mktemp("contract"), *table).wait()
    assert job.process.returncode == 0, job.output
    return {run["strategy"]: job[number] for number, run in enumerate(table)}


def test_the_table_has_every_name():
    """Elastic's replicas are jobs of their own: its promises are kept in test_elastic."""
    assert {*ALL, "elastic"} == set(NAMES)


@pytest.mark.parametrize("name", [*SYNC, *DIVIDED])
def test_two_processes_take_the_steps_of_one(runs, name):
    """float64: the only difference is the order of a sum of 8 gradients."""
    _, alone = run(Options(ranks=1, batch=8, samples=SAMPLES), "auto")
    torch.set_default_dtype(torch.float32)
    for rank in (0, 1):
        assert runs[name][rank]["weights"] == pytest.approx(digest(alone), abs=1e-12)


@pytest.mark.parametrize("name", ASYNC)
def test_each_sample_comes_once_an_epoch(runs, name):
    seen = [sample for rank in (0, 1) for batch in runs[name][rank]["seen"] for sample in batch]
    assert sorted(seen) == sorted(list(range(SAMPLES)) * EPOCHS)


@pytest.mark.parametrize("name", ASYNC)
def test_the_slow_rank_does_less(runs, name):
    fast, slow = (len(runs[name][rank]["seen"]) for rank in (0, 1))
    assert fast > 1.5 * slow


@pytest.mark.parametrize("name", [*SYNC, *DIVIDED, *ASYNC])
def test_ranks_end_with_the_same_weights_and_metrics(runs, name):
    first, second = runs[name][0], runs[name][1]
    assert first["weights"] == second["weights"]
    for metric in ("val_loss", "val_acc"):
        assert first["metrics"][metric] == second["metrics"][metric]
    if name not in DIVIDED:
        assert first["values"] == [1.0] * EPOCHS, "the sum of the ranks' numbers at each validation"


@pytest.mark.parametrize("name", ASYNC)
def test_staleness_is_reported_and_nothing_is_lost(runs, name):
    report = runs[name][0]["report"]
    steps = sum(len(runs[name][rank]["seen"]) for rank in (0, 1))
    if name == "async_sgd":
        assert sum(report["staleness"].values()) == steps
        assert report["pushed"] == report["applied"]
    else:
        assert report["steps"] == [len(runs[name][rank]["seen"]) for rank in (0, 1)]
        assert sum(report["staleness"].values()) == 2 * report["rounds"]


@pytest.mark.parametrize("name", ASYNC)
def test_it_learns(runs, name):
    assert runs[name][0]["metrics"]["val_acc"] >= 0.9


@pytest.mark.parametrize("name", [name for name in ALL if name not in SURVIVES])
def test_a_killed_worker_is_named_within_ten_seconds(job, name):
    loader = "same" if name in DIVIDED else "torch"
    done = job(
        {"strategy": name, "kill_rank": 1, "kill_step": 3, "epochs": 50, "samples": 400, "sleep_s": 0.01, "loader": loader}
    ).wait()
    facts = done[0][0]
    assert facts["error"] == "DistributedError"
    assert "rank 1 of 2 died" in facts["message"]
    assert facts["after_s"] < 10
    assert done.process.returncode not in (0, -signal.SIGKILL)
    assert done.gone()


@pytest.mark.parametrize("name", SURVIVES)
def test_a_killed_worker_is_survived_and_its_batch_comes_back(job, name):
    run = {"strategy": name, "kill_rank": 1, "kill_step": 3, "epochs": EPOCHS, "samples": SAMPLES, "batch": 2, "sleep_s": 0.005}
    done = job(run).wait()
    assert done.process.returncode == 0, done.output
    facts = done[0][0]
    seen = [sample for batch in facts["seen"] for sample in batch]
    finished_by_the_dead = 2 * 2  # it died in its third batch, of two samples each
    assert len(seen) >= SAMPLES * EPOCHS - finished_by_the_dead
    assert len(set(seen[: SAMPLES * EPOCHS])) == SAMPLES
    assert facts["report"]["lost"] == [1]
    assert facts["metrics"]["val_acc"] >= 0.9
    assert done.gone()


def test_a_killed_rank_zero_is_named_too(job):
    """Rank 0 holds the store and is the launcher: nothing must wait for it."""
    run = {"strategy": "async_sgd", "kill_rank": 0, "kill_step": 3, "epochs": 50, "samples": 400, "sleep_s": 0.01}
    done = job(run)
    done.process.wait(timeout=100)
    deadline = time.monotonic() + 15
    while 1 not in {int(p.stem.split("-")[1]) for p in done.out.glob("0-*.json")} and time.monotonic() < deadline:
        time.sleep(0.05)
    facts = done[0][1]
    assert facts["error"] == "DistributedError"
    assert "rank 0 of 2 died" in facts["message"]
    assert facts["after_s"] < 10
    assert done.gone()


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ALL)
def test_a_hundred_kills_at_random_moments(name, tmp_path):
    """Either rank, from the first meeting to the last epoch: no hang, no orphan, and an error that names the victim where one is due."""
    script = Path(__file__).with_name("kills.py")
    command = [sys.executable, script, name, "--kills", os.environ.get("KILLS", "100"), "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stdout.write(done.stdout)  # pytest -s shows the counts
    lines = [json.loads(line) for line in (tmp_path / "kills.jsonl").read_text().splitlines()]
    wrong = [line for line in lines if line["how"] not in ("named", "survived", "finished", "over before the kill")]
    assert not wrong, done.stderr[-2000:]
