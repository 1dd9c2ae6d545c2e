"""Members that differ in weights or batch statistics leave the network as it was."""

import copy

import pytest
import torch
from torch import nn

from lightning_cnn.callbacks import Ensemble, HorizontalFlip, MCBatchNorm, MCDropout, marginalized
from lightning_cnn.errors import CheckpointError, ConfigurationError

IMAGE = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.1), nn.Flatten(), nn.Linear(16, 3)).eval()


def mean_prob(nets, *images):
    with torch.no_grad():
        return torch.stack([net(image).softmax(-1) for net in nets for image in images or [IMAGE]]).mean(0).log()


@pytest.fixture
def checkpoints(tmp_path):
    paths = [tmp_path / f"{seed}.ckpt" for seed in (1, 2, 3)]
    for seed, path in zip((1, 2, 3), paths, strict=True):
        state = network(seed).state_dict()
        torch.save(state if seed == 1 else {"state_dict": state}, path)
    return paths


@pytest.mark.parametrize("batched", [False, True])
def test_an_ensemble_is_the_mean_probability_of_its_checkpoints(checkpoints, batched):
    net = network()
    before = copy.deepcopy(net.state_dict())
    with marginalized(net, [Ensemble(checkpoints, batched=batched), HorizontalFlip()]) as members:
        found = net(IMAGE)
        assert len(members) == 6
    expected = mean_prob([network(seed) for seed in (1, 2, 3)], IMAGE, IMAGE.flip(-1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_a_pattern_names_all_its_files(checkpoints):
    net, pattern = network(), str(checkpoints[0].parent / "*.ckpt")
    with marginalized(net, [Ensemble([pattern])]) as members:
        assert len(members) == 3
        found = net(IMAGE)
    torch.testing.assert_close(found, mean_prob([network(seed) for seed in (1, 2, 3)]), rtol=1e-5, atol=1e-6)


def test_an_exception_in_a_member_restores_the_weights(checkpoints):
    net = network()
    before = copy.deepcopy(net.state_dict())
    net[-1].register_forward_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError), marginalized(net, [Ensemble(checkpoints), MCDropout(3)]):
        net(IMAGE)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert not any("forward" in module.__dict__ for module in net.modules())


def test_foreign_damaged_and_missing_checkpoints_are_named(checkpoints, tmp_path):
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "foreign.ckpt")
    (tmp_path / "damaged.ckpt").write_bytes(checkpoints[0].read_bytes()[:100])
    for name, message in (("foreign", "lacks .* of 9 weights of Sequential"), ("damaged", "cannot be read")):
        with pytest.raises(CheckpointError, match=message), marginalized(network(), [Ensemble([tmp_path / f"{name}.ckpt"])]):
            pass
    with (
        pytest.raises(ConfigurationError, match=r"missing.ckpt' does not exist"),
        marginalized(network(), [Ensemble(["missing.ckpt"])]),
    ):
        pass
    with pytest.raises(ConfigurationError, match="batched=True"), marginalized(network(), [Ensemble(checkpoints, True), MCDropout(2)]):
        pass


def test_batch_norm_members_use_the_statistics_of_one_training_batch_each():
    data = [torch.rand(16, 3, 4, 4) * scale for scale in (1.0, 2.0, 3.0)]
    net = network()
    before = copy.deepcopy(net.state_dict())
    with marginalized(net, [MCBatchNorm(2, data=data)]):
        found = net(IMAGE)
    nets = []
    for batch in data[:2]:
        one = network()
        x = one[0](batch)
        one[1].running_mean.copy_(x.mean((0, 2, 3)).detach())
        one[1].running_var.copy_(x.var((0, 2, 3)).detach())
        nets.append(one)
    torch.testing.assert_close(found, mean_prob(nets), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    few = pytest.raises(ConfigurationError, match=r"MCBatchNorm\(4\) needs as many training batches; there are 3")
    with few, marginalized(net, [MCBatchNorm(4, data=data)]):
        pass
