"""Spectra of tiles."""

import pytest
import torch
from torch import nn

from lightning_cnn.conv import report, swap
from lightning_cnn.conv._call import Call, load, nbytes
from lightning_cnn.conv._tuner import Settings
from lightning_cnn.functional.conv import fft
from lightning_cnn.functional.conv.geometry import Geometry


def test_a_large_picture_needs_less_memory_than_one_transform_of_all_of_it():
    layer, x = swap(nn.Conv2d(3, 3, 7, padding=3), "fft_tiled"), torch.randn(1, 3, 130, 130)
    with torch.no_grad():
        y = layer(x)
    (call,) = layer._calls
    assert y.shape == x.shape
    assert load("fft_tiled").workspace(call) > 0
    assert load("fft_tiled").refuses(call) == ""


@pytest.mark.parametrize(("channels", "fits"), [(64, True), (96, True), (256, False)])
def test_dense_filters_of_31_pixels_fit_into_the_allowance_of_auto_up_to_a_hundred_channels(channels, fits):
    call = Call(
        "forward", (1, channels, 56, 56), (channels, channels, 31, 31), Geometry(padding=(15, 15)), torch.float32, "cpu", False, 1, True
    )
    assert (load("fft_tiled").workspace(call) <= Settings().max_workspace_mb * 2**20) == fits
    assert load("fft_tiled").workspace(call) > nbytes((channels, channels, 60, 31, 2), dtype=torch.float32), "the spectra are counted"


@pytest.mark.parametrize("name", ["fft", "fft_tiled"])
def test_filters_that_are_transformed_some_at_a_time_have_the_same_spectra(monkeypatch, name):
    layer, x = nn.Conv2d(3, 5, 4, dilation=2), torch.randn(2, 3, 11, 12)
    expected = layer(x)
    swap(layer, name)
    whole = layer(x)
    monkeypatch.setattr(fft, "FILLED", 1)
    assert torch.equal(layer(x), whole)
    assert torch.allclose(whole, expected, atol=1e-5)
    assert fft.filters_at_once(3, (16, 16)) == 1


def test_it_needs_stride_one():
    layer = swap(nn.Conv2d(1, 1, 3, stride=2), "fft_tiled")
    layer(torch.randn(1, 1, 9, 9))
    assert {row.reason for row in report(layer).rows} == {"fft_tiled needs stride 1"}
