"""Spectra of whole pictures."""

import pytest
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


@pytest.mark.parametrize("size", [(20, 20), (1, 20), (20, 3)])
def test_a_filter_larger_than_the_picture(size):
    layer, x = nn.Conv2d(2, 2, 31, padding=15), torch.randn(1, 2, *size, requires_grad=True)
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    found = swap(layer, "fft")(x)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(torch.autograd.grad(found.square().sum(), x)[0], gradient, atol=1e-4)
