"""Noise goes into a network and out again without a trace; names and shapes of parameters never change."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import densenet121, efficientnet_b0, resnet18, vgg11

from lightning_cnn.errors import NoEffectWarning, UnsupportedLayerError
from lightning_cnn.nn import DropConnectConv2d, DropConnectLinear, Dropout, StochasticDepth, inject
from lightning_cnn.nn.residual import residual_branches

ALL = {"dropout": 0.3, "dropconnect": 0.2, "stochastic_depth": 0.4}


def network():
    return resnet18(num_classes=5)


def traces(model):
    return {
        name: (type(m), sorted(m.__dict__), list(m._modules), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


def test_everything_is_as_before_after_removal():
    model = network()
    before, keys = traces(model), list(model.state_dict())
    with inject(model, **ALL) as injection:
        assert list(model.state_dict()) == keys
        assert type(model.fc) is DropConnectLinear
        assert sum(isinstance(m, Dropout) for m in model.modules()) == 1
        assert sum(isinstance(m, StochasticDepth) for m in model.modules()) == 8
        assert traces(model) != before
    assert traces(model) == before
    injection.remove()  # twice is once


def test_evaluation_is_the_plain_network_and_training_is_not():
    model, x = network().eval(), torch.randn(2, 3, 32, 32)
    plain = model(x)
    with inject(model, **ALL):
        assert torch.equal(model(x), plain)
        assert not torch.equal(model.train().apply(lambda m: m.eval() if isinstance(m, nn.BatchNorm2d) else m)(x), plain)


def test_the_noise_of_an_injection_comes_from_one_source():
    model, x = network().train(), torch.randn(4, 3, 32, 32)
    with inject(model, **ALL) as injection:
        injection.source.keyed(1, torch.arange(4), x.device)
        first = model(x)
        assert torch.equal(model(x), first)
        injection.source.keyed(2, torch.arange(4), x.device)
        assert not torch.equal(model(x), first)


def test_layers_of_one_injection_have_noise_of_their_own():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with inject(model, dropout=0.5) as injection:
        injection.source.keyed(1, torch.arange(4), torch.device("cpu"))
        a, b = (layer.injected_dropout(torch.ones(4, 64)) for layer in model)
    assert not torch.equal(a, b)


def test_names_choose_layers_and_the_depth_rule_is_linear():
    model = network()
    with inject(model, dropconnect={"layer1.*conv*": 0.1}, dropout={"layer4.1.conv2": 0.2}, stochastic_depth=0.8) as injection:
        assert set(injection.sites["dropconnect"]) == {f"layer1.{i}.conv{j}" for i in (0, 1) for j in (1, 2)}
        assert type(model.layer1[0].conv1) is DropConnectConv2d
        assert list(injection.sites["stochastic_depth"].values()) == pytest.approx([0.1 * k for k in range(1, 9)])


def test_a_copy_works_by_itself_and_can_be_compiled():
    model, x = network().train(), torch.randn(2, 3, 32, 32)
    with inject(model, **ALL) as injection:
        injection.source.keyed(1, torch.arange(2), x.device)
        twin = copy.deepcopy(model)
        expected = model(x)
    assert torch.equal(twin(x), expected)


@pytest.mark.parametrize(
    ("build", "count", "first"),
    [(resnet18, 8, "layer1.0.bn2"), (efficientnet_b0, 9, "features.2.1.stochastic_depth"), (vgg11, 0, None), (densenet121, 0, None)],
)
def test_residual_branches_are_found(build, count, first):
    with torch.device("meta"):
        found = residual_branches(build())
    assert len(found) == count
    assert (found[0] if found else None) == first


def test_a_part_that_cannot_be_traced_is_searched_child_by_child():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else x

    assert residual_branches(Branching())[0] == "inner.layer1.0.bn2"


def test_all_problems_are_named_at_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(UnsupportedLayerError) as caught:
        inject(model, dropout=0.5, dropconnect={"1": 0.1, "head": 0.1}, stochastic_depth=2.0)
    text = str(caught.value)
    assert text.startswith("5 problems")
    assert "dropout=0.5: the model has no nn.Linear" in text
    assert "no layer is called 'head'. The layers are 0, 1." in text
    assert "layer '1' is BatchNorm2d" in text
    assert "got p=2.0" in text
    assert "found no residual branch" in text


def test_a_second_injection_at_the_same_place_is_refused():
    model = network()
    with inject(model, **ALL), pytest.raises(UnsupportedLayerError, match="has it already"):
        inject(model, stochastic_depth={"layer1.0.bn2": 0.1})


def test_no_noise_warns():
    with pytest.warns(NoEffectWarning, match="asked for no noise"):
        inject(network())
