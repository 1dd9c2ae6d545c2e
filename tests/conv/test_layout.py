"""The other layout, there and back."""

import torch
from torch import nn

from lightning_cnn.conv import report, swap


def test_both_layouts_come_back_as_they_went():
    layer, x = swap(nn.Conv2d(4, 4, 3), "layout"), torch.randn(2, 4, 8, 8)
    last = x.contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous()
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(layer(x), layer(last), atol=1e-6)


def test_one_channel_has_one_layout():
    layer = swap(nn.Conv2d(1, 1, 3), "layout")
    layer(torch.randn(1, 1, 8, 8))
    assert "one channel has one layout" in report(layer).rows[0].reason
