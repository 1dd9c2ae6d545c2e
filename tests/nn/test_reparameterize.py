"""The merged network gives the outputs of the original, with one convolution where there were branches."""

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from lightning_cnn.errors import ConfigurationError, UnsupportedLayerError
from lightning_cnn.model import Classifier
from lightning_cnn.nn import reparameterize


class RepBlock(nn.Module):
    """RepVGG's block in training form: 3x3, 1x1 and identity, each with its batch norm; or a bare skip."""

    def __init__(self, outputs=8, stride=1, groups=1, bare_skip=False):
        super().__init__()
        self.conv3, self.bn3 = nn.Conv2d(8, outputs, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(outputs)
        self.conv1, self.bn1 = nn.Conv2d(8, outputs, 1, stride, groups=groups), nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if bare_skip or stride > 1 or outputs != 8 else nn.BatchNorm2d(8)
        self.has_skip, self.bare_skip = stride == 1 and outputs == 8, bare_skip

    def forward(self, x):
        out = self.bn3(self.conv3(x)) + self.bn1(self.conv1(x))
        if self.has_skip:
            out = out + (x if self.bare_skip else self.skip(x))
        return torch.relu(out)


def lived_in(model):
    """With batch norms as after training: none is the identity."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5), (module.running_var, 0.5)):
                value.data.uniform_(low, low + 1)
    return model.double().eval()


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(
    "options",
    [{}, {"bare_skip": True}, {"stride": 2}, {"outputs": 16}, {"groups": 4}, {"groups": 8, "bare_skip": True}],
    ids=str,
)
def test_parallel_branches_become_one_convolution(options):
    model, image = lived_in(nn.Sequential(RepBlock(**options))), torch.rand(2, 8, 9, 9, dtype=torch.float64)
    merged = reparameterize(model)
    assert torch.allclose(merged(image), model(image), rtol=0, atol=1e-12)
    assert (count(merged, nn.Conv2d), count(merged, nn.BatchNorm2d)) == (1, 0)


def test_a_residual_around_nonlinearities_keeps_its_sum():
    model, image = lived_in(get_model("resnet18", weights=None)), torch.rand(1, 3, 32, 32, dtype=torch.float64)
    merged = reparameterize(model)
    assert torch.allclose(merged(image), model(image), rtol=1e-9, atol=1e-9)
    assert (count(merged, nn.Conv2d), count(merged, nn.BatchNorm2d)) == (20, 0)


def test_a_convolution_that_is_read_or_called_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.last, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(self.last(torch.relu(self.bn(y) * y)))

    model, image = lived_in(Twice()), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    merged = reparameterize(model)
    assert torch.allclose(merged(image), model(image), rtol=0, atol=1e-12)
    assert count(merged, nn.BatchNorm2d) == 1


class Sum(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second, self.bn = first, second, nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(torch.relu(self.first(x) + self.second(x)))  # a norm that has nowhere to go


@pytest.mark.parametrize(
    "second",
    [
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 1, groups=8),
        nn.Conv2d(8, 8, (3, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    ],
)
def test_branches_of_different_form_keep_their_sum(second):
    for pair in ((nn.Conv2d(8, 8, 3, padding=1), second), (second, nn.Conv2d(8, 8, 3, padding=1))):
        model = lived_in(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), Sum(*pair)))
        image = torch.rand(1, 8, 9, 9, dtype=torch.float64)
        merged = reparameterize(model)
        assert torch.allclose(merged(image), model(image), rtol=0, atol=1e-12)
        assert count(merged, nn.Conv2d) == 3


def test_a_convolution_shared_by_two_norms_and_a_norm_by_batch_are_left_alone():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.last, self.by_batch = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False, track_running_stats=False)
            self.one, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.second(self.conv(torch.relu(self.first(self.conv(x)))))
            return self.norm(self.one(self.by_batch(self.last(y))))

    model, image = Shared(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for norm in (model.first, model.second, model.norm):
        norm.running_mean.uniform_()
    model = model.double().eval()
    merged = reparameterize(model)
    assert torch.allclose(merged(image), model(image), rtol=0, atol=1e-12)
    assert count(merged, nn.BatchNorm2d) == 3


def test_the_original_is_not_touched():
    model = lived_in(nn.Sequential(RepBlock(), nn.Conv2d(8, 8, 1)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = reparameterize(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert count(model, nn.Conv2d) == 3
    assert not {p.data_ptr() for p in merged.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_refusals_say_what_to_do():
    with pytest.raises(ConfigurationError, match=r"Call model\.eval\(\) first"):
        reparameterize(RepBlock())
    with pytest.raises(UnsupportedLayerError, match="no batch norm after a convolution"):
        reparameterize(nn.Sequential(nn.Conv2d(3, 3, 3)).eval())

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedLayerError, match=r"torch\.fx cannot trace Branching"):
        reparameterize(Branching().eval())


def test_a_lightning_module_is_told_which_of_its_parts_to_give():
    """Followed to the letter, the advice works."""
    model = Classifier(architecture="resnet20", classes=3).eval()
    with pytest.raises(UnsupportedLayerError, match=r"network: model\.network = reparameterize\(model\.network\)\.$"):
        reparameterize(model)
    x = torch.rand(2, 3, 16, 16)
    expected = model(x)
    model.network = reparameterize(model.network)
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert count(model, nn.BatchNorm2d) == 0


def test_the_merged_network_compiles_whole():
    merged, x = reparameterize(lived_in(nn.Sequential(RepBlock()))), torch.rand(2, 8, 9, 9, dtype=torch.float64)
    assert torch.allclose(torch.compile(merged, fullgraph=True, backend="aot_eager")(x), merged(x), atol=1e-6)
