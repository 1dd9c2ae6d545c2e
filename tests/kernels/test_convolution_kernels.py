"""The compiled loops: the constants they carry, every border, every share of the work."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d

from lightning_cnn.conv._winograd import transform_packed
from lightning_cnn.functional.conv import default, fft
from lightning_cnn.functional.conv import winograd as reference
from lightning_cnn.functional.conv.geometry import Geometry
from lightning_cnn.kernels import spectra, threads, winograd
from lightning_cnn.kernels.depthwise import depthwise, depthwise_weight


def test_the_constant_matrices_are_those_of_cook_and_toom():
    matrices = (winograd.INPUT_2, winograd.OUTPUT_2, winograd.TAPS_2), (winograd.INPUT_4, winograd.OUTPUT_4, winograd.TAPS_4)
    for m, (B, A, taps) in zip((2, 4), matrices, strict=True):
        exact_A, exact_G, exact_B = reference.cook_toom(m, 3)
        assert tuple(map(tuple, exact_A)) == A
        assert tuple(map(tuple, exact_B)) == B
        assert tuple(tuple(map(float, row)) for row in zip(*exact_G, strict=True)) == taps


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_winograd_for_any_border_and_any_share_of_the_work(data):
    draw = data.draw
    m, c, k = draw(st.sampled_from([2, 4])), draw(st.sampled_from([8, 24])), draw(st.sampled_from([1, 16, 24, 40]))
    x = torch.randn(draw(st.integers(1, 2)), c, draw(st.integers(3, 14)), draw(st.integers(3, 14)))
    w, bias, padding = torch.randn(k, c, 3, 3), torch.randn(k), (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    expected = conv2d(x, w, bias, padding=padding)
    pixels = x.permute(0, 2, 3, 1).contiguous().numpy()
    y = np.full((expected.shape[0], *expected.shape[2:], k), np.nan, np.float32)
    U = transform_packed(w, m)
    filled = torch.nn.functional.pad(bias, (0, -k % 16)).numpy()
    workers, block, splits = draw(st.integers(1, 3)), draw(st.sampled_from([6, 12])), draw(st.integers(1, 3))
    winograd.winograd(pixels, U.numpy(), filled, y, m, *padding, workers, block, splits if splits <= U.shape[1] else 1)
    assert torch.allclose(torch.from_numpy(y).permute(0, 3, 1, 2), expected, atol=2e-3)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_winograd_s_filter_gradient_for_any_border_and_any_share_of_the_work(data):
    draw = data.draw
    m, c, k = draw(st.sampled_from([2, 4])), draw(st.sampled_from([1, 16, 17, 40])), draw(st.sampled_from([1, 8, 13, 40]))
    x = torch.randn(draw(st.integers(1, 2)), c, draw(st.integers(3, 14)), draw(st.integers(3, 14)))
    geometry = Geometry(padding=(draw(st.integers(0, 3)), draw(st.integers(0, 3))))
    g = torch.randn_like(conv2d(x, torch.empty(k, c, 3, 3), padding=geometry.padding))
    gw = torch.full((k, c, 3, 3), torch.nan)
    gw = gw.contiguous(memory_format=torch.channels_last) if draw(st.booleans()) else gw
    pixels, gradient = (
        torch.nn.functional.pad(of.permute(0, 2, 3, 1), (0, -of.shape[1] % to)).contiguous().numpy() for of, to in ((x, 16), (g, 8))
    )
    workers, block = draw(st.integers(1, 3)), draw(st.sampled_from([1, 5, 128]))
    winograd.winograd_weight(pixels, gradient, gw.numpy(), m, *geometry.padding, workers, block)
    assert torch.allclose(gw, default.weight_gradient(x, g, (3, 3), geometry), atol=5e-4)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_depthwise_for_any_geometry_and_layout(data):
    draw = data.draw
    pair = st.tuples(st.integers(1, 2), st.integers(1, 3))
    geometry = Geometry(draw(pair), (draw(st.integers(0, 4)), draw(st.integers(0, 2))), draw(pair), draw(st.sampled_from([3, 8, 19])))
    kernel, c = (draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 9]))), geometry.groups
    x, w, bias = torch.randn(2, c, draw(st.integers(8, 13)), draw(st.integers(25, 30))), torch.randn(c, 1, *kernel), torch.randn(c)
    x = x.contiguous(memory_format=torch.channels_last) if draw(st.booleans()) else x
    expected = conv2d(x, w, bias, *geometry)
    y = torch.empty_like(expected).fill_(torch.nan)
    where = (*geometry.padding, *geometry.stride, *geometry.dilation, draw(st.integers(1, 3)))
    depthwise(x.numpy(), w.numpy(), bias.numpy(), y.numpy(), *where)
    assert torch.allclose(y, expected, atol=1e-4)
    g, gw = torch.randn(y.shape), torch.empty_like(w).fill_(torch.nan)
    g = g.contiguous(memory_format=torch.channels_last) if draw(st.booleans()) else g
    depthwise_weight(x.numpy(), g.numpy(), gw.numpy(), *where)
    assert torch.allclose(gw, default.weight_gradient(x, g, kernel, geometry), atol=1e-3)


@pytest.mark.parametrize("many", [1, 2])
def test_torch_keeps_its_own_number_of_threads(many):
    """Numba's start resizes the pool that both share."""
    before = torch.get_num_threads()
    assert 1 <= threads.use(many) <= many
    assert torch.get_num_threads() == before


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_products_of_spectra_for_any_sizes_and_any_share_of_the_work(data):
    """Panels that hang over, groups, transposed factors, either conjugate; double precision is the judge."""
    draw = data.draw
    groups, i, j, r = (draw(st.integers(1, high)) for high in (3, 5, 9, 5))
    a = torch.randn(groups, r, i, 8, 5, dtype=torch.complex64).transpose(1, 2)
    b = torch.randn(groups, j, r, 8, 5, dtype=torch.complex64)
    conjugate = draw(st.sampled_from(["", "a", "b"]))
    block = draw(st.sampled_from([8, 16, 80]))
    out = torch.full((groups, i, j, 8, 5), torch.nan, dtype=torch.complex64)
    arrays = (torch.view_as_real(each).flatten(3).unflatten(3, (-1, block)).numpy() for each in (a, b, out))
    signs = (np.float32(-1 if conjugate == factor else 1) for factor in "ab")
    spectra.contract(*arrays, *signs, draw(st.integers(1, 3)))
    exact = fft.contract(a.to(torch.complex128), b.to(torch.complex128), conjugate)
    assert (out - exact).abs().max() <= 8 * r * 2.0**-23 * 10
