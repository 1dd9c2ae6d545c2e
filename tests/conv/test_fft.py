"""Spectra of whole pictures."""

import torch
from torch import nn

from lightning_cnn.conv import swap
from lightning_cnn.conv._transformed import kept_bytes


def test_the_filters_spectrum_is_kept_only_while_no_gradient_is_recorded():
    layer, x = swap(nn.Conv2d(2, 2, 9), "fft"), torch.randn(1, 2, 16, 16)
    layer(x)
    assert kept_bytes(layer.weight) == 0
    with torch.no_grad():
        layer(x)
    assert kept_bytes(layer.weight) == 2 * 2 * 16 * 9 * 8


def test_a_filter_as_large_as_the_picture():
    layer, x = nn.Conv2d(2, 2, 31, padding=15), torch.randn(1, 2, 20, 20)
    expected = layer(x)
    assert torch.allclose(swap(layer, "fft")(x), expected, atol=1e-5)
