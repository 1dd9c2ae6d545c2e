"""What is kept for a weight, and when it is forgotten."""

import pytest
import torch
from torch import nn

from lightning_cnn.conv import swap
from lightning_cnn.conv._transformed import SAMPLE, forget, kept_bytes, transformed


def kept(weight, kind="kind"):
    """A copy of the weight as it was when the copy was made."""
    return transformed(weight, kind, weight.detach().clone, True)


def weight():
    return nn.Parameter(torch.randn(16, 8, 4, 4))  # 2048 values, of which every eighth is sampled


def test_it_is_computed_once_and_once_for_each_kind():
    w = weight()
    assert kept(w) is kept(w)
    assert kept(w, "other") is not kept(w)
    assert kept_bytes(w) == 2 * w.numel() * 4
    forget(w)
    assert kept_bytes(w) == 0
    assert transformed(w, "kind", w.detach().clone, False) is not transformed(w, "kind", w.detach().clone, False)
    assert kept_bytes(w) == 0


def test_pictures_of_two_sizes_have_two_spectra():
    layer = nn.Conv2d(3, 4, 5)
    pictures = [torch.randn(1, 3, size, size) for size in (9, 40, 9)]
    expected = [layer(x) for x in pictures]
    swap(layer, "fft")
    with torch.no_grad():
        assert all(torch.allclose(layer(x), y, atol=1e-5) for x, y in zip(pictures, expected, strict=True))


def in_place(w):
    with torch.no_grad():
        w[0, 0, 0, 1] += 1


def replaced(w):
    other = w.detach().clone()
    other[0, 0, 0, 1] += 1
    w.data = other


def cast(w):
    w.data = w.data.double()


def sampled(w):
    w.data[0, 0, 0, 0] += 1


@pytest.mark.parametrize("change", [in_place, replaced, cast, sampled])
def test_a_change_is_seen_by_the_counter_the_address_the_type_or_the_sample(change):
    w = weight()
    before, value = kept(w), w.detach().clone()
    change(w)
    assert w.dtype != value.dtype or not torch.equal(w, value)
    assert kept(w) is not before
    assert torch.equal(kept(w), w)


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.contiguous(memory_format=torch.channels_last), lambda w: w[:, ::2]])
def test_the_sample_spans_the_weight_in_every_layout(view):
    """The last 1/256 of the filters changes by a write that moves no counter."""
    w = nn.Parameter(view(weight().detach()))
    before, many = kept(w), -(-w.numel() // SAMPLE)
    w.data.permute(0, 2, 3, 1).reshape(-1)  # the order in memory of channels-last filters
    w.data[-1].mul_(2)
    assert many * SAMPLE >= w.numel()
    assert kept(w) is not before


def test_weights_born_in_inference_mode_have_no_counter_and_are_transformed_each_time():
    with torch.inference_mode():
        layer, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
        expected = layer(x)
        assert torch.allclose(swap(layer, "fft")(x), expected, atol=1e-5)
        assert kept_bytes(layer.weight) == 0
