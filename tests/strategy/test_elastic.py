"""Elastic: what a replica reads, a step that is repeated and a state that is taken, then real replicas with torchft."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_cnn.data import Resumable
from lightning_cnn.errors import ConfigurationError
from lightning_cnn.strategy import Elastic
from lightning_cnn.strategy._replica import ReplicaSampler, replica_loader

PLACE = {"replica": 0, "replicas": 1, "lighthouse": "http://localhost:1"}


class Manager:
    """Stands for torchft's: alone in the job. `refuse` steps are not agreed on the first time; `state` makes it behind the others."""

    def __init__(self, strategy, refuse=(), state=None):
        self.strategy, self.refuse, self.state, self.step, self.calls = strategy, set(refuse), state, 0, []

    def load_state_dict(self, state):
        self.step = state["step"]

    def start_quorum(self):
        self.calls.append("quorum")
        if self.state is not None:
            self.strategy._take(self.state)
            self.step, self.state = self.state["step"], None

    def allreduce(self, gradient):
        if self.step in self.refuse:
            gradient.fill_(float("nan"))  # torchft: a failed all-reduce leaves anything
        return SimpleNamespace(wait=lambda: None)

    def should_commit(self):
        agreed = self.step not in self.refuse
        self.refuse.discard(self.step)
        self.step += agreed
        return agreed

    def current_step(self):
        return self.step

    def num_participants(self):
        return 1

    def participating_rank(self):
        return 0

    def shutdown(self, wait):
        self.calls.append("shutdown")


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.seen = nn.Linear(3, 2), []

    def training_step(self, batch, _):
        self.seen.append(batch[1].tolist())
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1] % 2)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


def fit(monkeypatch, strategy=None, epochs=2, **manager):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    strategy = strategy or Elastic(**PLACE)
    made = []
    monkeypatch.setattr(Elastic, "_new_manager", lambda self: made.append(Manager(self, **manager)) or made[0])
    monkeypatch.setattr("lightning_cnn.strategy.elastic.importlib.util.find_spec", lambda name: "there")
    trainer, module = Trainer(accelerator="cpu", max_epochs=epochs, strategy=strategy, gradient_clip_val=0.1, **quiet), Net()
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(TensorDataset(x, torch.arange(12)), batch_size=4))
    return module, made[0] if made else None, trainer


def test_a_step_that_is_not_agreed_on_is_repeated_and_changes_nothing(monkeypatch):
    plain, _, _ = fit(monkeypatch, strategy="auto")
    module, manager, trainer = fit(monkeypatch, refuse=[0, 4])
    assert torch.equal(module.net.weight, plain.net.weight)
    assert len(module.seen) == len(plain.seen) + 2
    assert module.seen[0] == module.seen[1]
    assert manager.calls == ["quorum"] * 8 + ["shutdown"]
    assert trainer.global_step == manager.step == 6
    assert "Elastic" not in str(trainer.optimizers[0].step), "the optimizer's own step is back"


def test_a_replica_that_comes_back_takes_weights_optimizer_schedule_and_place(monkeypatch):
    """It joins at step 4 of 6, in the second of two epochs, and trains on what is left of it."""
    ahead, _, trainer = fit(monkeypatch, epochs=1)
    state = {
        "module": ahead.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedulers": [trainer.lr_scheduler_configs[0].scheduler.state_dict()],
        "epoch": 1,
        "step": 4,
    }
    module, manager, trainer = fit(monkeypatch, state=state)
    assert module.seen == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert (trainer.global_step, trainer.current_epoch, manager.step) == (6, 2, 6)
    assert int(trainer.optimizers[0].state[module.net.weight]["step"]) == 3 + 2
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2


@pytest.mark.parametrize("kind", ["torch", "lane"])
def test_replicas_read_every_sample_once_an_epoch_whatever_the_step_they_join_at(kind):
    data = [(torch.zeros(1), i) for i in range(12)]
    make = {"torch": lambda: DataLoader(data, batch_size=2, shuffle=True), "lane": lambda: Resumable(data, batch_size=2)}[kind]
    step, skipped = SimpleNamespace(now=3), []
    loaders = [replica_loader(make(), replica, 3, lambda: step.now, skipped.append) for replica in range(3)]
    assert [len(loader) for loader in loaders] == [2] * 3
    joined = [batch[1].tolist() for batch in loaders[0]]
    assert skipped == [1]
    step.now = 2
    whole = [[batch[1].tolist() for batch in loader] for loader in loaders]
    assert sorted(i for batches in whole for batch in batches for i in batch) == list(range(12))
    assert joined == whole[0][1:], "step 3 is the second of the epoch that begins with step 2"


def test_a_step_taken_meanwhile_is_not_read_again():
    step = SimpleNamespace(now=0)
    sampler = ReplicaSampler(order=lambda epoch: range(8), samples=8, batch_size=2, replica=0, replicas=1, step=lambda: step.now)
    batches = iter(sampler)
    first, step.now = next(batches), 3
    assert (first, next(batches)) == ([0, 1], [6, 7])


def test_what_cannot_work_is_named(monkeypatch):
    with pytest.raises(ConfigurationError, match=r"(?s)2 problems.*replica must be.*min_replicas"):
        Elastic(replica=-1, min_replicas=0)
    for name in ("REPLICA_GROUP_ID", "NUM_REPLICA_GROUPS", "TORCHFT_LIGHTHOUSE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match=r"(?s)3 problems.*REPLICA_GROUP_ID.*NUM_REPLICA_GROUPS.*torchft_lighthouse"):
        fit(monkeypatch, strategy=Elastic())

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(ConfigurationError, match="own sampler"):
        replica_loader(DataLoader(Stream()), 0, 1, int, int)
    with pytest.raises(ConfigurationError, match="3 replicas"):
        replica_loader(DataLoader(range(4), batch_size=2), 0, 3, int, int)


def test_without_torchft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchft", None)
    monkeypatch.setattr("lightning_cnn.strategy.elastic.importlib.util.find_spec", lambda name: None)
    trainer = Trainer(accelerator="cpu", strategy=Elastic(**PLACE), accumulate_grad_batches=2, logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigurationError, match=r"(?s)2 problems.*lightning-cnn\[elastic\].*accumulate_grad_batches"):
        trainer.fit(Net(), DataLoader(TensorDataset(torch.zeros(4, 3), torch.arange(4))))


@pytest.mark.soak
def test_a_killed_replica_does_not_stop_the_other_and_comes_back(tmp_path):
    """With the real torchft: kill -9 replica 1, see replica 0 go on, start replica 1 again, and both end with equal weights."""
    from torchft.coordination import LighthouseServer

    house = LighthouseServer(bind="[::]:0", min_replicas=1, join_timeout_ms=2000, quorum_tick_ms=50, heartbeat_timeout_ms=2000)

    def start(replica):
        env = {**os.environ, "TORCHFT_LIGHTHOUSE": house.address(), "REPLICA_GROUP_ID": str(replica), "NUM_REPLICA_GROUPS": "2"}
        run = {"strategy": "elastic", "kwargs": {"timeout_s": 10}, "ranks": 1, "samples": 800, "batch": 2, "epochs": 3, "sleep_s": 0.05,
               "optimizer": "momentum", "out": str(tmp_path)}  # fmt: skip
        log = (tmp_path / f"log{replica}").open("a")
        job = Path(__file__).with_name("training_job.py")
        return subprocess.Popen(
            [sys.executable, str(job), json.dumps([run])], env={**env, "JOB_LIMIT_S": "280"}, stdout=log, stderr=log
        )

    replicas = [start(0), start(1)]
    try:
        time.sleep(25)
        assert [r.poll() for r in replicas] == [None, None], (tmp_path / "log0").read_text()[-3000:]
        replicas[1].send_signal(signal.SIGKILL)
        time.sleep(5)
        assert replicas[0].poll() is None, "the survivor goes on"
        replicas[1].wait()
        replicas[1] = start(1)
        assert [r.wait(timeout=200) for r in replicas] == [0, 0], (tmp_path / "log0").read_text()[-3000:]
        ends = [json.loads((tmp_path / f"0-{r}.json").read_text()) for r in (0, 1)]
        assert ends[0]["weights"] == pytest.approx(ends[1]["weights"], abs=1e-12)
        assert len(ends[0]["seen"]) >= 600 > len(ends[1]["seen"]) > 0
        assert ends[0]["metrics"]["val_acc"] >= 0.9
    finally:
        for replica in replicas:
            replica.kill()
        house.shutdown()
