"""F(2x2, 3x3): which layers it takes, and in which precision."""

import pytest
import torch
from torch import nn

from lightning_cnn.conv import report, swap


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(8, 8, 5), "needs 3x3 kernels, this one is 5x5"),
        (nn.Conv2d(8, 8, 3, stride=2), "needs stride 1 and dilation 1"),
        (nn.Conv2d(8, 8, 3, dilation=2), "needs stride 1 and dilation 1"),
        (nn.Conv2d(8, 8, 3, groups=2), "needs one group"),
        (nn.Conv2d(8, 8, 3, dtype=torch.bfloat16), "lose half precision"),
    ],
)
def test_it_refuses_by_name(layer, why):
    swap(layer, "winograd2")
    layer(torch.randn(1, 8, 9, 9, dtype=layer.weight.dtype))
    assert why in report(layer).rows[0].reason


def test_float64_goes_through_the_reference_and_float32_through_the_kernel():
    layer, x = nn.Conv2d(8, 12, 3, padding=1), torch.randn(2, 8, 9, 7)
    exact = layer.double()(x.double())
    swap(layer, "winograd2")
    assert torch.allclose(layer(x.double()), exact, atol=1e-12)
    assert torch.allclose(layer.float()(x).double(), exact, atol=1e-4)
