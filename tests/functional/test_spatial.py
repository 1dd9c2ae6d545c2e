"""Dividing a picture and asking for what `reach` says gives the layer's output, whatever the window; no process is needed to see it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_cnn.functional.spatial import Interval, adaptive_weights, divisors, output_size, padded_sources, reach, split

WINDOW = {
    "size": st.integers(1, 24),
    "parts": st.integers(1, 4),
    "kernel": st.integers(1, 7),
    "stride": st.integers(1, 4),
    "before": st.integers(0, 4),
    "after": st.integers(0, 4),
    "dilation": st.integers(1, 3),
}


def padded(x, interval, fill=0.0):
    """The positions of an interval that may reach beyond the picture."""
    return torch.tensor([x[i].item() if 0 <= i < len(x) else fill for i in range(*interval)])


@settings(max_examples=150, deadline=None)
@given(**WINDOW)
def test_parts_of_a_convolution_laid_end_to_end_are_the_convolution(size, parts, kernel, stride, before, after, dilation):
    window = {"kernel": kernel, "stride": stride, "before": before, "dilation": dilation}
    assume(size + before + after > dilation * (kernel - 1))
    x, w = torch.arange(1.0, size + 1), torch.arange(1.0, kernel + 1)[None, None]
    whole = F.conv1d(F.pad(x, (before, after))[None, None], w, stride=stride, dilation=dilation)[0, 0]
    assert output_size(size, after=after, **window) == len(whole)
    assume(len(whole) >= parts)
    pieces = [padded(x, reach(part, **window))[None, None] for part in split(len(whole), parts)]
    assert torch.equal(torch.cat([F.conv1d(piece, w, stride=stride, dilation=dilation)[0, 0] for piece in pieces]), whole)


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 20),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    pad=st.integers(0, 2),
    ceil=st.booleans(),
    count=st.booleans(),
)
def test_divisors_are_those_of_average_pooling(size, kernel, stride, pad, ceil, count):
    assume(2 * pad <= kernel and size + 2 * pad >= kernel)
    means = F.avg_pool1d(torch.ones(1, 1, size), kernel, stride, pad, ceil, count)[0, 0]
    assert output_size(size, kernel=kernel, stride=stride, before=pad, after=pad, ceil=ceil) == len(means)
    inside = divisors(Interval(0, len(means)), size, kernel=kernel, stride=stride, before=pad, after=pad, padding=False)
    counted = divisors(Interval(0, len(means)), size, kernel=kernel, stride=stride, before=pad, after=pad, padding=count)
    torch.testing.assert_close((inside / counted).float(), means)


@given(size=st.integers(1, 20), outputs=st.integers(1, 9), parts=st.integers(1, 4))
def test_adaptive_pooling_is_the_sum_of_the_parts(size, outputs, parts):
    x = torch.arange(1.0, size + 1, dtype=torch.float64)
    total = sum(adaptive_weights(part, size, outputs) @ x[slice(*part)] for part in split(size, parts))
    torch.testing.assert_close(total, F.adaptive_avg_pool1d(x[None], outputs)[0])


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@given(size=st.integers(1, 9), before=st.integers(0, 4), after=st.integers(0, 4))
def test_padded_positions_are_those_of_pad(mode, size, before, after):
    assume(max(before, after) < size)
    x = torch.arange(float(size))[None, None]
    assert padded_sources(size, before, after, mode) == F.pad(x, (before, after), mode=mode)[0, 0].tolist()
