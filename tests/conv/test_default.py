"""The default is torch to the bit."""

import torch
from torch import nn

from lightning_cnn.conv import report, swap


def test_it_is_torch_to_the_bit_and_costs_no_detour():
    layer, x = nn.Conv2d(3, 4, 3, stride=2), torch.randn(2, 3, 9, 9)
    expected = layer(x)
    assert torch.equal(swap(layer, "default")(x), expected)
    assert layer(x).grad_fn.name() == expected.grad_fn.name()
    assert {row.algorithm for row in report(layer).rows} == {"default"}
