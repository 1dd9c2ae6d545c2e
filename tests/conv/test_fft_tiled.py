"""Spectra of tiles."""

import torch
from torch import nn

from lightning_cnn.conv import report, swap
from lightning_cnn.conv._call import load


def test_a_large_picture_needs_less_memory_than_one_transform_of_all_of_it():
    layer, x = swap(nn.Conv2d(3, 3, 7, padding=3), "fft_tiled"), torch.randn(1, 3, 130, 130)
    with torch.no_grad():
        y = layer(x)
    (call,) = layer._calls
    assert y.shape == x.shape
    assert load("fft_tiled").workspace(call) > 0
    assert load("fft_tiled").refuses(call) == ""


def test_it_needs_stride_one():
    layer = swap(nn.Conv2d(1, 1, 3, stride=2), "fft_tiled")
    layer(torch.randn(1, 1, 9, 9))
    assert {row.reason for row in report(layer).rows} == {"fft_tiled needs stride 1"}
