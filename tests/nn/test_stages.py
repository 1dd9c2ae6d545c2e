"""Stages of any CNN, without data."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_cnn.errors import UnsupportedLayerError
from lightning_cnn.nn import stages

TORCHVISION = {
    "resnet18": ["stem", "layer1", "layer2", "layer3", "layer4", "head"],
    "squeezenet1_0": ["stem", "features.3..5", "features.7..10", "features.12", "head"],
    "vgg11": ["stem", "features.3", "features.6..8", "features.11..13", "features.16..18", "classifier.0..3", "head"],
    "mobilenet_v2": ["stem", "features.2..3", "features.4..6", "features.7..13", "features.14..18", "head"],
    "convnext_tiny": ["stem", "features.2..3", "features.4..5", "features.6..7", "head"],
    "googlenet": ["stem", "conv2..conv3", "inception3a..inception3b", "inception4a..inception4e", "inception5a..inception5b", "head"],
}
TIMM = {
    "resnet18": TORCHVISION["resnet18"],
    "regnety_004": ["stem", "s1", "s2", "s3", "s4", "head"],
    "efficientnet_b0": ["stem", "blocks.1", "blocks.2", "blocks.3..4", "blocks.5..conv_head", "head"],
}
EVERY = [("torchvision", name) for name in TORCHVISION] + [("timm", name) for name in TIMM]


def build(library: str, name: str) -> nn.Module:
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(name)
        return getattr(torchvision.models, name)(**({"init_weights": False} if name == "googlenet" else {}))


@pytest.mark.parametrize(("library", "name"), EVERY)
def test_stages_are_those_of_the_paper_and_hold_each_parameter_once(library, name):
    model = build(library, name)
    found = stages(model)
    assert [stage.name for stage in found] == {"torchvision": TORCHVISION, "timm": TIMM}[library][name]
    held = [id(parameter) for stage in found for parameter in stage.parameters()]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_looking_for_stages_changes_nothing():
    model = torchvision.models.squeezenet1_0(num_classes=3)
    model.classifier.eval()
    modes = [module.training for module in model.modules()]
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    stages(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_other_hooks_do_not_see_the_look_and_stay():
    model, seen = torchvision.models.squeezenet1_0(num_classes=3), []
    model.features[3].register_forward_hook(lambda *_: seen.append(1))
    stages(model)
    assert not seen
    model(torch.zeros(1, 3, 32, 32))
    assert seen == [1]


def test_a_wrapper_is_looked_through_and_its_own_parameters_go_to_the_head():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torchvision.models.resnet18(num_classes=2)
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.backbone(x) / self.temperature

    found = stages(Wrapper())
    assert [stage.name for stage in found][1:] == ["backbone.layer1", "backbone.layer2", "backbone.layer3", "backbone.layer4", "head"]
    assert any(parameter.shape == () for parameter in found[-1].parameters())


def test_patterns_name_the_stages_and_the_last_takes_the_rest():
    model = torchvision.models.resnet18(num_classes=2)
    low, high, head = stages(model, ["conv1|bn1|layer[12]", "layer[34]", "fc"])
    assert (low.name, len(low.modules), len(high.modules)) == ("conv1|bn1|layer[12]", 4, 2)
    assert [p.shape for p in head.parameters()] == [(2, 512), (2,)]
    assert sum(len(list(stage.parameters())) for stage in (low, high, head)) == len(list(model.parameters()))


def test_bad_patterns_are_refused_together():
    with pytest.raises(UnsupportedLayerError, match=r"2 problems:(?s:.)*'blok1' matches no module(?s:.)*'layer1', which an earlier"):
        stages(torchvision.models.resnet18(num_classes=2), ["layer1", "blok1", "layer[12]", "fc"])


def test_a_model_that_cannot_be_run_is_refused_with_what_to_do():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x, mask):
            return self.conv(x * mask)

    with pytest.raises(UnsupportedLayerError, match=r"Odd could not be run without data.*patterns="):
        stages(Odd())
    assert [stage.name for stage in stages(Odd(), ["conv"])] == ["conv"]


def test_small_networks_with_a_fixed_input_size_are_run_at_their_size():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten())
    model = nn.Sequential(net, nn.Linear(4 * 4 * 4, 10))
    assert [stage.name for stage in stages(model)] == ["stem", "0.3", "head"]
