"""A call knows the shapes of its gradients, its operations and its memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_cnn.conv import swap
from lightning_cnn.conv._call import Call, load
from lightning_cnn.conv._swap import replace_role
from lightning_cnn.conv._transformed import kept_bytes
from lightning_cnn.functional.conv.geometry import Geometry, gradient_as_forward


def call(x, weight, geometry, **others):
    return Call(
        "forward",
        x,
        weight,
        geometry,
        **{"dtype": torch.float32, "device": "cpu", "channels_last": False, **others},
        threads=1,
        keep=True,
    )


pairs = st.tuples(st.integers(0, 4), st.integers(0, 4))
steps = st.tuples(st.integers(1, 2), st.integers(1, 2))


@given(size=st.tuples(st.integers(9, 12), st.integers(9, 12)), kernel=steps, padding=pairs, dilation=steps, groups=st.integers(1, 3))
def test_the_input_s_gradient_as_a_forward_call_has_the_shapes_that_are_computed_with(size, kernel, padding, dilation, groups):
    given = call((2, 2 * groups, *size), (3 * groups, 2, *kernel), Geometry((1, 1), padding, dilation, groups))
    found = replace_role(given, "input").as_forward()
    g, mirrored, geometry = gradient_as_forward(torch.empty(given.y), torch.empty(given.weight), given.geometry)
    assert (found.x, found.weight, found.geometry) == (g.shape, mirrored.shape, geometry)
    assert found.y == given.x


def test_operations_are_those_that_torch_counts():
    given = call((2, 6, 9, 11), (4, 3, 3, 2), Geometry((2, 1), (1, 0), (1, 2), 2))
    with FlopCounterMode(display=False) as counter:
        y = nn.functional.conv2d(torch.randn(given.x), torch.randn(given.weight), None, *given.geometry)
    assert given.flops == counter.get_total_flops()
    assert given.y == y.shape


@pytest.mark.parametrize("name", ["winograd2", "winograd4", "fft", "fft_tiled"])
def test_the_memory_counts_the_filters_that_are_kept_and_the_gradient_s_own_shapes(name):
    layer = swap(nn.Conv2d(64, 64, 3, padding=(0, 2)), name)
    with torch.no_grad():
        layer(torch.randn(1, 64, 9, 14))
    (given,) = layer._calls
    assert kept_bytes(layer.weight) > 0
    assert load(name).workspace(given) > kept_bytes(layer.weight)
    if name != "fft":  # its three passes are of one size
        gradient = replace_role(given, "input")
        assert load(name).workspace(gradient) == load(name).workspace(gradient.as_forward())


def test_threads_each_have_a_scratch_picture():
    one = call((1, 16, 9, 9), (16, 1, 3, 3), Geometry(padding=(1, 1), groups=16))
    assert load("depthwise").workspace(one) > 2 * 9 * 9 * 8 * 4
