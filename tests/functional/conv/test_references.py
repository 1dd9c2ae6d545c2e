"""The references teach; so they must be right in exact arithmetic, and their facts must be facts."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cnn.functional.conv import default, depthwise, fft, fft_tiled, im2col, layout, winograd
from lightning_cnn.functional.conv.geometry import Geometry, fast_size, gradient_as_forward, spread, tile_size

EXACT = 1e-11


def picture(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def case(stride=(1, 1), padding=(1, 2), dilation=(1, 1), groups=1, kernel=(3, 3), channels=2, filters=3):
    geometry = Geometry(stride, padding, dilation, groups)
    x, w = picture(2, channels * groups, 12, 11), picture(filters * groups, channels, *kernel)
    y = default.forward(x, w, geometry)
    return geometry, x, w, y, torch.randn_like(y)


@pytest.mark.parametrize("way", [layout, im2col, fft, fft_tiled])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_three_passes_equal_the_default(way, data):
    stride = (1, 1) if way is fft_tiled else (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)))
    pad, dilation = (data.draw(st.integers(0, 4)), 1), (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)))
    geometry, x, w, y, g = case(stride, pad, dilation, data.draw(st.integers(1, 3)), (data.draw(st.integers(1, 4)), 3))
    size, kernel = (12, 11), (w.shape[2], w.shape[3])
    assert torch.allclose(way.forward(x, w, geometry), y, atol=EXACT)
    assert torch.allclose(way.input_gradient(g, w, size, geometry), default.input_gradient(g, w, size, geometry), atol=EXACT)
    assert torch.allclose(way.weight_gradient(x, g, kernel, geometry), default.weight_gradient(x, g, kernel, geometry), atol=EXACT)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (3, 2)])
def test_winograd_of_any_tile_equals_the_default(m, padding):
    geometry, x, w, y, g = case(padding=padding)
    assert torch.allclose(winograd.forward(x, w, geometry, m), y, atol=EXACT)
    expected = default.input_gradient(g, w, (12, 11), geometry)
    assert torch.allclose(winograd.input_gradient(g, w, (12, 11), geometry, m), expected, atol=EXACT)
    expected = default.weight_gradient(x, g, (w.shape[2], w.shape[3]), geometry)
    assert torch.allclose(winograd.weight_gradient(x, g, (w.shape[2], w.shape[3]), geometry, m), expected, atol=EXACT)


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_depthwise_sums_shifted_pictures(stride):
    geometry, x, w, y, g = case(stride, dilation=(1, 2), groups=4, channels=1, filters=1)
    assert torch.allclose(depthwise.forward(x, w, geometry), y, atol=EXACT)
    assert torch.allclose(
        depthwise.weight_gradient(x, g, (3, 3), geometry), default.weight_gradient(x, g, (3, 3), geometry), atol=EXACT
    )


@given(m=st.integers(1, 6), r=st.integers(2, 3))
@settings(max_examples=12, deadline=None)
def test_cook_toom_is_exact_in_fractions(m, r):
    """y_i = sum_j d_(i+j) g_j as an identity of rational numbers, not to a tolerance."""
    A, G, B = winograd.cook_toom(m, r)
    d, g = [Fraction(3 * i * i - 7, i + 2) for i in range(m + r - 1)], [Fraction(j + 1, 3) for j in range(r)]

    def times(M, v):
        return [sum(a * b for a, b in zip(row, v, strict=True)) for row in M]

    y = times(A, [u * v for u, v in zip(times(G, g), times(B, d), strict=True)])
    assert y == [sum(d[i + j] * g[j] for j in range(r)) for i in range(m)]


def test_the_input_gradient_is_a_forward_convolution_even_under_too_much_padding():
    for padding in ((0, 0), (1, 1), (4, 3)):
        geometry, _, w, _, g = case(padding=padding)
        assert torch.allclose(
            default.forward(*gradient_as_forward(g, w, geometry)), default.input_gradient(g, w, (12, 11), geometry), atol=EXACT
        )


def test_sizes():
    assert spread(torch.ones(1, 1, 2, 2), (2, 3)).sum() == 4
    assert all(fast_size(n) >= n for n in range(1, 50))
    assert tile_size((2000, 2000), (3, 3)) < 100 < tile_size((2000, 2000), (63, 63))


def test_half_precision_pictures_are_transformed_in_float32():
    x, w = torch.randn(1, 2, 8, 8, dtype=torch.bfloat16), torch.randn(2, 2, 3, 3, dtype=torch.bfloat16)
    y = fft.forward(x, w)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), default.forward(x.float(), w.float()), atol=0.05)
