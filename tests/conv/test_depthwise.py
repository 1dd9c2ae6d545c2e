"""Depthwise: what it takes, and that both layouts give the same."""

import torch
from torch import nn

from lightning_cnn.conv import report, swap


def test_it_needs_one_filter_a_channel_and_stride_one_for_the_inputs_gradient():
    model = swap(nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 3, stride=2, groups=8)), "depthwise")
    model(torch.randn(1, 4, 12, 12)).sum().backward()
    rows = {(row.layer, row.role): row for row in report(model).rows}
    assert "one filter a channel" in rows["0", "forward"].reason
    assert rows["1", "forward"].algorithm == rows["1", "weight"].algorithm == "depthwise"
    assert "needs stride 1" in rows["1", "input"].reason


def test_channels_that_do_not_fill_a_register_do_not_leak_into_each_other():
    layer, x = swap(nn.Conv2d(11, 11, 5, padding=2, groups=11), "depthwise"), torch.randn(1, 11, 16, 16)
    with torch.no_grad():
        before = layer(x)
        x[:, 3] = torch.nan
        after = layer(x)
    others = [c for c in range(11) if c != 3]
    assert torch.equal(before[:, others], after[:, others])
    assert after[:, 3].isnan().any()
