"""The matrix product, and what its columns cost."""

import torch
from torch import nn

from lightning_cnn.conv import report, swap


def test_the_report_shows_nine_copies_of_the_picture():
    layer = swap(nn.Conv2d(4, 4, 3, padding=1), "im2col")
    with torch.no_grad():
        layer(torch.randn(2, 4, 64, 64))
    (row,) = report(layer).rows
    assert row.workspace_mb == 9 * 2 * 4 * 64 * 64 * 4 / 2**20
