"""The field of a stack is what the gradient of one output pixel touches."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cnn.functional import receptive_field as module
from lightning_cnn.functional.receptive_field import Field, receptive_field

layer = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2))


def touched(convolve, pixels, output_pixel):
    x = torch.ones(1, 1, pixels, dtype=torch.float64, requires_grad=True)
    convolve(x)[0, 0, output_pixel].backward()
    seen = x.grad[0, 0].nonzero()[:, 0].tolist()
    return (seen[0], seen[-1]) if seen else (None, None)


def test_the_lecture_s_numbers_hold():
    assert doctest.testmod(module).failed == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(layer, min_size=1, max_size=4))
def test_a_field_is_what_the_gradient_touches(layers):
    field = Field()
    for kernel, stride, padding, dilation in layers:
        field = field.through(kernel, stride, padding, dilation)
    assert receptive_field([k for k, *_ in layers], [s for _, s, *_ in layers], [d for *_, d in layers]) == field.size

    def stack(x):
        for kernel, stride, padding, dilation in layers:
            x = torch.nn.functional.conv1d(x, torch.ones(1, 1, kernel, dtype=x.dtype), None, stride, padding, dilation)
        return x

    at = int(-(-(200 - field.low) // field.stride))  # far from both borders
    assert touched(stack, 1200, at) == (field.low + at * field.stride, field.high + at * field.stride)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2))
def test_a_transposed_convolution_stays_in_its_bounds(kernel, stride, padding):
    weight = torch.ones(1, 1, kernel, dtype=torch.float64)
    low, high = touched(lambda x: torch.nn.functional.conv_transpose1d(x, weight, None, stride, padding), 40, 30)
    field = Field().transposed(kernel, stride, padding)
    if low is not None:  # with a stride above the kernel some outputs see nothing
        assert field.low + 30 * field.stride <= low
        assert high <= field.high + 30 * field.stride
        assert high - low + 1 <= field.size


def test_fields_of_different_strides_are_not_joined_silently():
    with pytest.raises(ValueError, match="strides 1 and 2 do not meet"):
        Field().join(Field(stride=2))
