"""AsyncSGD: the server's arithmetic in one process, then whole jobs."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.strategy import AsyncSGD, diagnose
from lightning_cnn.strategy._server import Shard, flatten, own_copy, parts, settings_of, shares


def small(optimizer=torch.optim.AdamW, **kwargs):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return net, optimizer(net.parameters(), **kwargs)


@pytest.mark.parametrize(("make", "kwargs"), [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})])
def test_fresh_gradients_on_two_shards_are_the_optimizers_own_steps(make, kwargs):
    net, optimizer = small(make, **kwargs)
    parameters = list(net.parameters())
    cuts = shares([p.numel() for p in parameters], 2)
    servers = [Shard(optimizer, parameters[cut], 1, None, False) for cut in cuts]
    for step in range(3):
        for p in parameters:
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        for server, cut in zip(servers, cuts, strict=True):
            mine = parameters[cut]
            server.push(0, flatten([p.grad for p in mine]), server.version, [True] * len(mine), settings_of(optimizer))
        optimizer.step()
    for server, cut in zip(servers, cuts, strict=True):
        flat, version = server.answer(0)
        assert version == 3
        for ours, theirs in zip(parts(flat, parameters[cut]), parameters[cut], strict=True):
            assert torch.equal(ours, theirs)


def test_a_stale_gradient_is_scaled():
    """An age of 4 quarters the step of plain SGD, and the histogram knows it."""
    net, optimizer = small(torch.optim.SGD, lr=1.0)
    shard = Shard(optimizer, list(net.parameters()), 2, None, True)
    n = sum(p.numel() for p in net.parameters())
    for _ in range(4):
        shard.push(0, torch.zeros(n), shard.version, [True] * 4, [1.0, 0.0, 0.0])
    before, _ = shard.answer(0)
    shard.push(1, torch.ones(n), 0, [True] * 4, [1.0, 0.0, 0.0])
    after, _ = shard.answer(1)
    assert before - after == pytest.approx(torch.full((n,), 0.25))
    assert shard.ages == {0: 4, 4: 1}


def test_a_parameter_without_a_gradient_does_not_even_decay():
    net, optimizer = small(lr=0.1, weight_decay=0.5)
    shard = Shard(optimizer, list(net.parameters()), 1, None, False)
    before = [m.detach().clone() for m in shard.masters]
    shard.push(0, torch.zeros(sum(p.numel() for p in net.parameters())), 0, [False, True, True, True], settings_of(optimizer))
    assert torch.equal(before[0], shard.masters[0])
    assert not torch.equal(before[2], shard.masters[2])


def test_the_copy_brings_its_state_and_leaves_the_original_alone():
    net, optimizer = small(lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it wraps optimizer.step
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    own, masters = own_copy(optimizer, list(net.parameters())[:2])
    before = flatten(list(net.parameters()))
    for master in masters:
        master.grad = torch.ones_like(master)
    own.step()
    assert torch.equal(before, flatten(list(net.parameters())))
    assert {int(s["step"]) for s in own.state.values()} == {2}
    assert len(own.state) == 2


@pytest.mark.parametrize("sizes", [[5, 5], [100, 1, 1], [1, 1, 100], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("servers", [1, 2])
def test_shares_cover_everything_once(sizes, servers):
    cuts = shares(sizes, servers)
    assert len(cuts) == servers
    assert [size for cut in cuts for size in sizes[cut]] == sizes
    assert all(sizes[cut] for cut in cuts)


def test_all_wrong_arguments_are_named_at_once():
    with pytest.raises(ConfigurationError, match=r"(?s)3 problems.*staleness.*servers.*compression"):
        AsyncSGD(staleness=-1, servers=0, compression="int8")


def test_the_doctor_names_what_cannot_work():
    from training_job import Classifier, Options

    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=AsyncSGD(servers=3), sync_batchnorm=True, val_check_interval=2, limit_train_batches=0.5
    )
    module = Classifier(Options())
    module.norm = nn.BatchNorm2d(4)
    found = diagnose(trainer, module)
    assert len(found.problems) == 4
    for word in ("servers=3", "BatchNorm", "val_check_interval", "limit_train_batches"):
        assert any(word in problem for problem in found.problems)


def test_bounded_staleness_two_servers_a_schedule_and_a_checkpoint(job):
    """One job: the bound holds, the schedule runs on the job's clock, fp16 pushes learn, and another number of ranks resumes it."""
    common = {"strategy": "async_sgd", "samples": 64, "batch": 2, "sleep_s": 0.004, "slow_rank": 1, "shuffle": True}
    bounded = {**common, "kwargs": {"staleness": 2, "servers": 2}, "optimizer": "adamw", "save_epoch": True}
    free = {**common, "kwargs": {"compression": "fp16"}, "scheduler": "onecycle", "optimizer": "momentum", "loader": "torch"}
    own = {**common, "loader": "own"}
    done = job(bounded, free, own).wait()
    assert done.process.returncode == 0, done.output
    report = done[0][0]["report"]
    assert max(map(int, report["staleness"])) <= 2 * 2 + 1
    assert report["pushed"] == report["applied"]
    for rank in (0, 1):
        assert done[1][rank]["lrs"][-1] < 0.01 < max(done[1][rank]["lrs"]), "both ranks saw the whole cycle"
    assert done[1][0]["metrics"]["val_acc"] >= 0.9
    assert [len(done[2][rank]["seen"]) for rank in (0, 1)] == [48, 16], "a loader that splits for itself is left alone"
    resumed_alone(done)


def resumed_alone(done):
    """The checkpoint of two servers holds one optimizer and the next epoch; one process goes on from it."""
    from training_job import Options, run

    path = done.out / "epoch=0.ckpt"
    saved = torch.load(path, weights_only=True)
    assert sorted(saved["optimizer_states"][0]["state"]) == list(range(6))
    _, module = run(Options(ranks=1, batch=2, samples=64, epochs=2, resume=str(path), optimizer="adamw", out=str(done.out)), "auto")
    torch.set_default_dtype(torch.float32)
    assert len(module.seen) == 32
