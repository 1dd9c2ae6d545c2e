"""Packed convolution equals the float one, bit for bit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cnn.kernels import xnor
from lightning_cnn.kernels.bits import FIRST, LAST, WORDS, Geometry, pack, thresholds

SPECIAL = torch.tensor([-0.0, 0.0, float("nan"), float("-inf"), -1e-45, 1e-45])


def signs(x):
    return torch.where(x < 0, -1.0, 1.0)


def plain(filters):
    return np.repeat(np.float32([[1], [0], [1], [0]]), filters, 1)


def packed_words(x, channels_last=True, threads=1):
    image = x.permute(0, 2, 3, 1).contiguous() if channels_last else x.contiguous()
    layout = LAST if channels_last else FIRST
    return pack(image.data_ptr(), layout, (len(x), *x.shape[2:]), x.shape[1], threads)


def packed_conv(x, weight, geometry, finish=None, tables=True, threads=1, channels_last=True, words=False, plus=None):
    """Floats where `finish` is float, else words."""
    filters, size = len(weight), (len(x), *x.shape[2:])
    panel = np.ascontiguousarray(xnor.panels((weight < 0).numpy(), geometry.dilation_w, tables))
    finish = np.ascontiguousarray(plain(filters) if finish is None else finish)
    to_words = finish.dtype == np.int32
    shape = (len(x), *geometry.output_size(*size[1:]))
    out = np.empty((*shape, -(-filters // 64)), np.uint64) if to_words else np.empty((*shape, filters), np.float32)
    image = x.permute(0, 2, 3, 1).contiguous() if channels_last else x.contiguous()
    source, layout = image.data_ptr(), LAST if channels_last else FIRST
    if words:
        signs_of_x, layout = packed_words(x, channels_last, threads), WORDS
        source = signs_of_x.ctypes.data
    addresses = panel.ctypes.data, finish.ctypes.data, out.ctypes.data
    added = 0 if plus is None else plus.data_ptr()
    xnor.convolve(source, layout, size, *addresses, filters, to_words, geometry, threads, tables, added)
    return out


def unpack(words, channels):
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    assert not bits[..., channels:].any()
    return bits[..., :channels].astype(bool)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("channels", [1, 63, 64, 65, 130])
def test_a_bit_is_one_below_zero_alone(channels, channels_last):
    x = torch.randn(2, channels, 5, 14)
    x.view(-1)[: len(SPECIAL)] = SPECIAL[: x.numel()]
    words = packed_words(x, channels_last)
    assert (unpack(words, channels) == (x < 0).permute(0, 2, 3, 1).numpy()).all()


@given(
    n=st.integers(1, 2),
    channels=st.integers(1, 140),
    filters=st.integers(1, 140),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    tables=st.booleans(),
    source=st.sampled_from(["channels_last", "planes", "words"]),
    seed=st.integers(0, 2**30),
)
@settings(max_examples=60, deadline=None)
def test_packed_equals_float(n, channels, filters, size, kernel, stride, padding, dilation, tables, source, seed):
    """Over channels that fill no word, borders, strides and dilations, with -0.0 in inputs and weights."""
    geometry = Geometry(channels, *kernel, *stride, *padding, *dilation)
    if min(geometry.output_size(*size)) < 1:
        return
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, *size, generator=generator)
    x[torch.rand(x.shape, generator=generator) < 0.1] = -0.0
    weight = torch.randn(filters, channels, *kernel, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = -0.0
    want = F.conv2d(signs(x), signs(weight), stride=stride, padding=padding, dilation=dilation)
    got = packed_conv(x, weight, geometry, tables=tables, channels_last=source != "planes", words=source == "words")
    assert torch.equal(torch.from_numpy(got).permute(0, 3, 1, 2), want)


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("filters", [3, 64, 130])
def test_bits_are_finished_by_thresholds_that_may_point_down(tables, filters):
    x, weight = torch.randn(1, 66, 5, 6), torch.randn(filters, 66, 3, 3)
    threshold, flip = torch.randint(-20, 20, (filters,), dtype=torch.int32), torch.rand(filters) < 0.5
    got = packed_conv(x, weight, Geometry(66, 3, 3), thresholds(threshold.numpy(), flip.numpy()), tables)
    dot = F.conv2d(signs(x), signs(weight)).permute(0, 2, 3, 1)
    assert (unpack(got, filters) == ((dot < threshold) != flip).numpy()).all()


@pytest.mark.parametrize("tables", [True, False])
def test_floats_are_rounded_as_batch_norm_rounds_them(tables):
    x, weight = torch.randn(1, 64, 6, 5), torch.randn(70, 64, 3, 3)
    affine = torch.randn(4, 70)
    got = packed_conv(x, weight, Geometry(64, 3, 3, padding_h=1, padding_w=1), affine.numpy(), tables)
    dot = F.conv2d(signs(x), signs(weight), padding=1).permute(0, 2, 3, 1)
    scaled = (dot * affine[0] + affine[1]).double()
    torch.testing.assert_close(torch.from_numpy(got), (scaled * affine[2] + affine[3]).float(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("tables", [True, False])
def test_what_is_added_is_added_to_the_rounded_result(tables):
    x, weight, affine = torch.randn(2, 30, 6, 5), torch.randn(150, 30, 3, 3), torch.randn(4, 150).numpy()
    plus = torch.randn(2, 6, 5, 150)
    alone, sum_ = (packed_conv(x, weight, Geometry(30, 3, 3, 1, 1, 1, 1), affine, tables, plus=p) for p in (None, plus))
    assert torch.equal(torch.from_numpy(sum_), torch.from_numpy(alone) + plus)


@pytest.mark.parametrize("tables", [True, False])
def test_the_longest_sum_does_not_overflow(tables):
    """Every product differs: the popcount is the largest that a filter of this size can have."""
    channels = xnor.MAX_PRODUCTS
    x, weight = torch.ones(1, channels, 1, 2), -torch.ones(1, channels, 1, 1)
    assert packed_conv(x, weight, Geometry(channels, 1, 1), tables=tables).ravel().tolist() == [-channels] * 2


@pytest.mark.parametrize("tables", [True, False])
def test_two_threads_give_the_same_bits(tables):
    x, weight = torch.randn(2, 70, 9, 9), torch.randn(64, 70, 3, 3)
    geometry = Geometry(70, 3, 3, padding_h=1, padding_w=1)
    one, two = (packed_conv(x, weight, geometry, tables=tables, threads=t) for t in (1, 2))
    assert (one == two).all()
