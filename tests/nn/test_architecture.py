"""A table of what layers see and cost agrees with gradients, with counted FLOPs and with the figures everybody knows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model

from lightning_cnn.errors import ConfigurationError, UnsupportedLayerError
from lightning_cnn.functional.roofline import Roofline
from lightning_cnn.nn.architecture import architecture, effective_field, effective_size


class Graph(nn.Module):
    """A residual, parallel branches, a shortcut by slicing, an asymmetric pad, a dilation and functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, (3, 5), stride=2, padding=(1, 2))
        self.small, self.large = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.down, self.mix = nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 4, 1)
        self.out = nn.Identity()

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.cat([self.small(x) + x, self.large(x)], 1)
        x = self.down(F.pad(x, (0, 1, 1, 1))) + F.avg_pool2d(x[:, :, ::2, ::2], 1)
        return self.out(F.max_pool2d(F.relu(self.mix(x)), 2, 1))


def only_positive(model):
    """With positive weights nothing cancels: the gradient is non-zero exactly where an output pixel can see."""
    for parameter in model.parameters():
        parameter.data.abs_().add_(0.1)
    return model.double()


def touched(model, layer, pixels):
    """First and last row, first and last column that the middle pixel of `layer` depends on; max pooling made to see all it reads."""
    image = torch.ones(1, 1, pixels, pixels, dtype=torch.float64)
    seen = (effective_field(model, layer, image) > 0).nonzero()
    return [tuple(seen[:, axis].aminmax()) for axis in (0, 1)]


@pytest.mark.parametrize("layer", ["stem", "small", "large", "down", "mix"])
def test_a_field_over_residuals_and_branches_is_what_the_gradient_touches(layer):
    model = only_positive(Graph())
    row = architecture(model, torch.ones(1, 1, 64, 64, dtype=torch.float64))[layer]
    for field, size, (low, high) in zip(row.seen, row.output[-2:], touched(model, layer, 64), strict=True):
        at = size // 2 * field.stride
        assert (field.low + at, field.high + at) == (low, high)


def test_a_join_sees_the_larger_branch_and_a_pooling_all_it_reads():
    seen = architecture(Graph(), torch.rand(1, 1, 64, 64))["out"].seen
    # height: stem 3, large +2*4, down +2*2, max pooling of 2 with stride 4: +4
    assert [field.size for field in seen] == [3 + 8 + 4 + 4, 5 + 8 + 4 + 4]
    assert [field.stride for field in seen] == [4, 4]


@pytest.mark.parametrize(
    ("name", "layer", "size", "multiply_adds"),
    [("resnet18", "layer4.1.bn2", 435, 1_814_073_344), ("vgg11", "features.20", 150, 7_609_090_048)],
)
def test_the_figures_everybody_knows(name, layer, size, multiply_adds):
    """Multiply-adds as torchvision publishes them: 1.81 and 7.61 G."""
    found = architecture(get_model(name, weights=None), torch.rand(1, 3, 224, 224))
    assert [field.size for field in found[layer].seen] == [size, size]
    assert found.multiply_adds == multiply_adds


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_0", "mobilenet_v3_small", "swin_t"])
def test_multiply_adds_are_half_of_the_counted_flops(name):
    model, image = get_model(name, weights=None).eval(), torch.rand(1, 3, 64, 64)
    found = architecture(model, image)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(image)
    assert 2 * found.multiply_adds == counted.get_total_flops()
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_a_crop_moves_the_field():
    class Crop(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3)

        def forward(self, x):
            return self.conv(x[:, :, 3:-1, 1::2])

    height, width = architecture(Crop(), torch.rand(1, 1, 16, 16))["conv"].seen
    assert (height.low, height.high, height.stride) == (3, 5, 1)
    assert (width.low, width.high, width.stride) == (1, 5, 2)


def test_channel_shuffles_and_channels_last_blocks_keep_their_field():
    for name, layer in (("shufflenet_v2_x0_5", "conv5.0"), ("convnext_tiny", "features.1.0.block.3")):
        seen = architecture(get_model(name, weights=None), torch.rand(1, 3, 64, 64))[layer].seen
        assert all(field.stride > 0 for field in seen)


def test_after_a_gate_over_the_whole_picture_everything_is_seen():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = self.conv(x)
            return self.last(x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)))

    found = architecture(Gate(), torch.rand(2, 3, 20, 30))
    assert [field.size for field in found["conv"].seen] == [3, 3]
    assert [field.size for field in found["last"].seen] == [20, 30]


def test_bytes_and_intensity_of_a_layer_by_hand():
    row = architecture(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False)), torch.rand(1, 4, 10, 10))["0"]
    assert row.activation_bytes == 4 * 800
    assert row.intensity == pytest.approx(2 * 800 * 36 / (4 * (400 + 800 + 288)))


def test_a_layer_called_twice_has_two_rows_and_one_in_place_adds_nothing():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 3), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.conv(self.relu(self.conv(x)))

    found = architecture(Twice(), torch.rand(1, 3, 9, 9))
    assert [row.output for row in found.rows] == [(1, 3, 7, 7), (1, 3, 7, 7), (1, 3, 5, 5)]
    assert found["conv"].output == (1, 3, 5, 5)
    assert found["relu"].activation_bytes == 0
    assert found.activation_bytes == 4 * 3 * (49 + 25)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Dropout())
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    architecture(model, torch.rand(1, 3, 8, 8))
    effective_field(model, "0", torch.rand(1, 3, 8, 8))
    assert [m.training for m in model] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_the_effective_field_is_smaller_than_the_theoretical_one():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(1 if i == 0 else 8, 8, 3, padding=1) for i in range(10)))
    strength = effective_field(model, "9", torch.rand(4, 1, 41, 41))
    theoretical = architecture(model, torch.rand(1, 1, 41, 41))["9"].seen[0].size
    assert strength.sum() == pytest.approx(1, abs=1e-5)
    assert 3 < effective_size(strength) < theoretical == 21


def test_the_middle_of_a_picture_that_is_wider_than_high():
    assert effective_field(nn.Sequential(nn.Conv2d(1, 1, 1)), "0", torch.rand(1, 1, 9, 21)).nonzero().tolist() == [[4, 10]]


def test_the_table_reads_from_the_first_layer_to_the_total():
    lines = str(architecture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), torch.rand(1, 3, 8, 8))).splitlines()
    assert lines[2].split()[:6] == ["0", "Conv2d", "3x3", "1x8x6x6", "224", "7.78"]
    assert lines[-1].startswith("total")


def test_refusals_say_what_to_give():
    with pytest.raises(ConfigurationError, match=r"pictures \(b c h w\) as its first tensor; got a tensor of shape \(3, 8, 8\)"):
        architecture(nn.Conv2d(3, 3, 3), torch.rand(3, 8, 8))
    with pytest.raises(UnsupportedLayerError, match="Layer '1' gives no feature map"):
        effective_field(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten()), "1", torch.rand(1, 3, 8, 8))
    with pytest.raises(KeyError, match="No layer 'body' ran"):
        architecture(nn.Conv2d(3, 3, 3), torch.rand(1, 3, 8, 8))["body"]


def test_the_roof_says_what_bounds_a_layer_and_its_least_time():
    """A 1x1 convolution to one channel reads more than it computes; a 9x9 one computes more than it reads."""
    model = nn.Sequential(nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 9))
    found = architecture(model, torch.rand(1, 8, 20, 20), best=Roofline(1e9, 2e8, 0.0))
    moved = 4 * (8 * 400 + 9 + 400)
    assert found.attainable_s(found["0"]) == moved / 2e8
    assert found.attainable_s(found["1"]) == 2 * 144 * 8 * 81 / 1e9
    lines = str(found).splitlines()
    assert "memory" in lines[2]
    assert "compute" in lines[3]
    assert lines[-1].split()[-1] == f"{1e3 * sum(map(found.attainable_s, found.rows)):.3f}"
