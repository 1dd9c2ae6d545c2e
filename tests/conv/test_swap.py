"""What a swapped layer asks, keeps in mind and leaves to torch; what is swapped, and what is not."""

import contextlib

import pytest
import torch
from torch import nn

from lightning_cnn.conv import _swap, report, swap
from lightning_cnn.conv._call import NAMES
from lightning_cnn.conv._swap import SwappedConv2d, tuners
from lightning_cnn.conv._transformed import kept_bytes
from lightning_cnn.conv._tuner import Decision, Tuner
from lightning_cnn.errors import ConfigurationError


@contextlib.contextmanager
def two_threads():
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def test_the_short_way_is_asked_anew_for_whatever_a_choice_depends_on():
    layer, x = swap(nn.Conv2d(3, 4, 3), "auto", cache=None), torch.randn(2, 3, 8, 8)
    pictures = [x, x[:1], x.contiguous(memory_format=torch.channels_last), x.double(), x.clone().requires_grad_()]
    found = [layer._asked(picture, layer.weight) for picture in pictures]
    for context in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16), two_threads()):
        with context:
            found.append(layer._asked(x, layer.weight))
    tuners(layer)[0].decide({})
    found.append(layer._asked(x, layer.weight))
    assert len(set(found)) == len(found) == 9


@pytest.mark.parametrize("plan", ["auto", "default/default/fft"])
def test_a_layer_of_which_a_gradient_alone_has_another_way_does_not_take_the_short_one(monkeypatch, plan):
    ways = {"forward": "default", "input": "default", "weight": "fft"}
    monkeypatch.setattr(Tuner, "measure", lambda self, calls: {c: Decision(ways[c.role], 1, 2, 0, 0, "said") for c in calls})
    layer, x = swap(nn.Conv2d(3, 4, 3), plan, cache=None), torch.randn(1, 3, 8, 8, requires_grad=True)
    for _ in range(3):
        y = layer(x)
        y.sum().backward()
        assert "Convolution" not in y.grad_fn.name()
    assert {row.role: row.algorithm for row in report(layer).rows} == ways


@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "input weight", "weight bias", ""])
@pytest.mark.parametrize("name", ["fft", "default/fft/fft"])
def test_what_alone_wants_a_gradient_gets_it_and_nothing_else_does(name, wanted):
    layer, x = nn.Conv2d(3, 4, 3, bias="bias" in wanted), torch.randn(1, 3, 8, 8, requires_grad="input" in wanted)
    layer.weight.requires_grad_("weight" in wanted)
    leaves = [leaf for leaf in (x, *layer.parameters()) if leaf.requires_grad]
    expected = torch.autograd.grad(layer(x).square().sum(), leaves) if wanted else []
    y = swap(layer, name)(x)
    assert y.requires_grad == bool(wanted)
    found = torch.autograd.grad(y.square().sum(), leaves) if wanted else []
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_the_first_pattern_that_fits_counts_and_a_second_swap_replaces_the_plan():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), torch.randn(1, 3, 9, 9)
    swap(model, {"0": "fft", "*": "im2col"})
    with torch.no_grad():
        model(x)
        assert [row.algorithm for row in report(model).rows] == ["fft", "im2col"]
        swap(model, "layout")(x)
    assert [row.algorithm for row in report(model).rows] == ["layout", "layout"]


def test_subclasses_keep_their_own_way():
    class Standardized(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight - weight.mean(), bias)

    model, x = nn.Sequential(Standardized(3, 4, 3), nn.Conv2d(4, 4, 3)), torch.randn(1, 3, 9, 9)
    expected = model(x)
    assert torch.allclose(swap(model, "fft")(x), expected, atol=1e-5)
    assert type(model[0]) is Standardized
    assert "Standardized computes in its own way" in report(model).rows[0].reason


@pytest.mark.parametrize("name", [*NAMES, "auto"])
def test_a_picture_that_does_not_fit_is_refused_in_torch_s_words(name):
    layer = nn.Conv2d(3, 4, 3)
    shapes = [(1, 5, 8, 8), (8, 8), (1, 1, 3, 8, 8), (1, 3, 2, 8), (1, 3, 1, 8)]
    for x in (*map(torch.randn, shapes), torch.randn(1, 3, 8, 8, dtype=torch.float64)):
        with pytest.raises(RuntimeError) as stock:
            layer(x)
        with pytest.raises(RuntimeError) as ours:
            swap(layer, name)(x)
        assert str(ours.value) == str(stock.value)
        layer.__class__ = nn.Conv2d


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_same_size_from_an_even_kernel_takes_one_more_zero_on_one_side(name, mode):
    layer, x = nn.Conv2d(4, 4, (2, 4), padding="same", groups=4, padding_mode=mode), torch.randn(2, 4, 9, 8)
    expected = layer(x)
    assert torch.allclose(swap(layer, name)(x), expected, atol=1e-5)
    assert expected.shape == x.shape


def test_complex_pictures_and_double_precision_under_autocast_are_as_in_torch():
    for dtype in (torch.complex64, torch.float64):
        layer, x = nn.Conv2d(3, 4, 3, dtype=dtype), torch.randn(1, 3, 8, 8, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float64):
            expected, found = layer(x), swap(layer, "fft")(x)
        assert found.dtype == expected.dtype
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_frozen_layer_keeps_its_transform_where_gradients_are_on():
    layer = swap(nn.Conv2d(3, 4, 3), "fft").requires_grad_(False)
    layer(torch.randn(1, 3, 8, 8))
    assert kept_bytes(layer.weight) > 0


def test_what_is_remembered_of_ever_new_shapes_is_bounded(monkeypatch):
    monkeypatch.setattr(_swap, "REMEMBERED_SHAPES", 4)
    layer = swap(nn.Conv2d(3, 4, 3), "im2col")
    for size in range(8, 18):
        layer(torch.randn(1, 3, size, 8))
    assert len(layer._stock) <= 4
    assert len(layer._calls) <= 4


def test_traced_and_exported_graphs_hold_torch_s_convolution():
    layer, x = swap(nn.Conv2d(3, 4, 3), "fft").eval(), torch.randn(1, 3, 8, 8)
    traced = torch.jit.trace(layer, x, check_trace=False)
    exported = torch.export.export(layer, (x,))
    assert "aten::_convolution" in str(traced.inlined_graph)
    assert "aten.conv2d" in str(exported.graph)
    assert torch.allclose(traced(x), layer(x), atol=1e-5)


def test_an_empty_batch_is_not_measured():
    layer = swap(nn.Conv2d(3, 4, 3), "auto", cache=None, max_error=0.031)  # a tuner of this test's own
    x = torch.randn(0, 3, 8, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 3, 8, 8)
    assert layer.weight.grad.abs().sum() == 0
    assert not tuners(layer)[0].decisions


def test_memory_below_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="max_workspace_mb must not be negative, it is -1"):
        swap(nn.Conv2d(3, 4, 3), "auto", max_workspace_mb=-1)
    assert type(swap(nn.Conv2d(3, 4, 3), "auto", max_workspace_mb=0)) is SwappedConv2d
